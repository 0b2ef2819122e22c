"""The names of the engines' backends, as people write them. Imports none of them."""

from __future__ import annotations

from typing import Literal, get_args

from remora_contract.errors import RequestInvalid

BackendName = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
BACKEND_HELP = (
    "What computes: onnxruntime (this processor), tensorrt or tensorrt_rtx (NVIDIA GPUs; not yet "
    "run on one, docs/tensorrt.md)."
)
BUILD_HELP = "Whose engine: onnxruntime (this processor), tensorrt or tensorrt_rtx (NVIDIA GPUs)."


def check_backend(name: str) -> BackendName:
    """Raises RequestInvalid for an unknown one."""
    for known in BACKENDS:
        if name == known:
            return known
    raise RequestInvalid(f"backend must be one of {', '.join(BACKENDS)}, not {name[:40]!r}")
