"""Whether the installed ONNX Runtime can run the portable graph, and so record golden prompts."""

from __future__ import annotations

import re

from remora_contract.errors import Unsupported

# The first with a CPU kernel for TensorScatter (opset 24): 1.24 was seen to lack it.
OLDEST = (1, 25)


def require_runtime(version: str) -> None:
    """`version` of onnxruntime, for example "1.32.0". Raises Unsupported when it is too old."""
    numbers = re.findall(r"\d+", version)
    if tuple(map(int, numbers[:2])) < OLDEST:
        raise Unsupported(
            f"onnxruntime {version} cannot run the graph, so no golden prompts can be recorded; "
            f"use onnxruntime {OLDEST[0]}.{OLDEST[1]} or newer, which needs Python 3.11 or newer, "
            "or give --no-golden (devices may stay on Python 3.10)"
        )
