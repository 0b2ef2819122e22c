"""Whether the installed ONNX Runtime can run the portable graph, and so record golden prompts."""

from __future__ import annotations

import re

from remora_contract.bundle import GraphDialect
from remora_contract.errors import Unsupported

# The first with a CPU kernel for TensorScatter, which is opset 24: 1.24 was seen to lack it.
_NATIVE = (1, 25)
# The last for Python 3.10, seen to run the legacy graph.
_LEGACY = (1, 23)


def require_runtime(version: str, dialect: GraphDialect = "native") -> None:
    """`version` of onnxruntime, for example "1.32.0". Raises Unsupported when it is too old."""
    oldest = _NATIVE if dialect == "native" else _LEGACY
    needs = ", which needs Python 3.11 or newer," if dialect == "native" else ""
    numbers = re.findall(r"\d+", version)
    if tuple(map(int, numbers[:2])) < oldest:
        raise Unsupported(
            f"onnxruntime {version} cannot run the graph, so no golden prompts can be recorded; "
            f"use onnxruntime {oldest[0]}.{oldest[1]} or newer{needs} "
            "or give --no-golden (devices may stay on Python 3.10)"
        )
