"""TensorRT Edge-LLM's wheel on this device: is it there, and which one. Imports nothing of it."""

from __future__ import annotations

from functools import cache
from importlib import metadata, util

from remora_contract.errors import Unsupported

MODULE = "tensorrt_edgellm"
DISTRIBUTION = "tensorrt-edgellm"
BACKEND = "edgellm"
READ_VERSION = "0.11.0"  # whose runtime API this was written against
INSTALL = (
    f"pip install {DISTRIBUTION}=={READ_VERSION} on x86-64 with CUDA 13 and its TensorRT; PyPI has "
    "no aarch64 wheel, so on a Jetson build one from github.com/NVIDIA/TensorRT-Edge-LLM"
)


def require_installed() -> str:
    """The wheel's version. Raises Unsupported with what to install."""
    version = installed_version()
    if version is None or util.find_spec(MODULE) is None:
        raise Unsupported(f"backend {BACKEND} needs TensorRT Edge-LLM's wheel: {INSTALL}")
    return version


@cache
def installed_version() -> str | None:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None
