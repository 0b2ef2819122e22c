"""The names of the engines' backends, as people write them. Imports none of them."""

from __future__ import annotations

from typing import Literal, cast, get_args

from remora_contract.errors import RequestInvalid

BackendName = Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "edgellm"]
TensorRTName = Literal["tensorrt", "tensorrt_rtx"]
Overlap = Literal["auto", "off"]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)
OVERLAP_HELP = (
    "Whether a prompt is read beside decode steps: auto (where the backend can and memory allows "
    "it) or off."
)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
BACKEND_HELP = (
    "What computes: onnxruntime (this processor), tensorrt or tensorrt_rtx (NVIDIA GPUs; not yet "
    "run on one, docs/tensorrt.md), edgellm (bundles of TensorRT Edge-LLM's engines; emulated, not "
    "run, docs/edgellm.md)."
)
BUILD_HELP = "Whose engine: onnxruntime (this processor), tensorrt or tensorrt_rtx (NVIDIA GPUs)."

# Those whose engines compute step by step, and are built by this agent.
STEPPED: tuple[BackendName, ...] = ("onnxruntime", "tensorrt", "tensorrt_rtx")


def check_overlap(name: str) -> Overlap:
    """Raises RequestInvalid."""
    for known in OVERLAPS:
        if name == known:
            return known
    raise RequestInvalid(f"overlap must be one of {', '.join(OVERLAPS)}, not {name[:40]!r}")


def check_backend(name: str) -> BackendName:
    """Raises RequestInvalid for an unknown one."""
    for known in BACKENDS:
        if name == known:
            return known
    raise RequestInvalid(f"backend must be one of {', '.join(BACKENDS)}, not {name[:40]!r}")


def check_stepped(name: str) -> BackendName:
    """Raises RequestInvalid for an unknown one, and for one that answers whole requests alone."""
    backend = check_backend(name)
    if backend not in STEPPED:
        raise RequestInvalid(
            f"backend {backend} has no engines of ours: its bundles come ready from `remora-build "
            "edgellm` and answer behind `remora-agent serve` and `run` alone"
        )
    return backend


def check_tensorrt(name: str) -> TensorRTName:
    """Raises RequestInvalid."""
    for known in get_args(TensorRTName):
        if name == known:
            return cast(TensorRTName, known)
    raise RequestInvalid(f"backend {name} is no TensorRT")
