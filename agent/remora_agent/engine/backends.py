"""The names of the engines' backends, as people write them. Imports none of them."""

from __future__ import annotations

from typing import Literal, get_args

from remora_contract.errors import RequestInvalid

BackendName = Literal["onnxruntime", "tensorrt", "tensorrt_rtx"]
Overlap = Literal["auto", "off"]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)
OVERLAP_HELP = (
    "Whether a prompt is read beside decode steps: auto (where the backend can and memory allows "
    "it) or off."
)
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)
BACKEND_HELP = (
    "What computes: onnxruntime (this processor), tensorrt or tensorrt_rtx (NVIDIA GPUs; not yet "
    "run on one, docs/tensorrt.md)."
)
BUILD_HELP = "Whose engine: onnxruntime (this processor), tensorrt or tensorrt_rtx (NVIDIA GPUs)."

_EDGE_LLM = (
    "there is no backend edgellm: TensorRT Edge-LLM's runtime answers whole requests with one "
    "adapter at a time and gives no logits (docs/adr/0012). Export the checkpoint with "
    "`remora-build export` and use tensorrt or tensorrt_rtx; adapters for Edge-LLM itself are "
    "written by `remora-build adapter --format edgellm`"
)


def check_overlap(name: str) -> Overlap:
    """Raises RequestInvalid."""
    for known in OVERLAPS:
        if name == known:
            return known
    raise RequestInvalid(f"overlap must be one of {', '.join(OVERLAPS)}, not {name[:40]!r}")


def check_backend(name: str) -> BackendName:
    """Raises RequestInvalid for an unknown one, and for one that was planned and is not there."""
    for known in BACKENDS:
        if name == known:
            return known
    if name == "edgellm":
        raise RequestInvalid(_EDGE_LLM)
    raise RequestInvalid(f"backend must be one of {', '.join(BACKENDS)}, not {name[:40]!r}")
