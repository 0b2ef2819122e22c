"""The GPU of this machine, as far as an engine depends on it, and the processors one is built for.

Asks CUDA's runtime, the driver and nvpmodel's files; allocates nothing on the device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from remora_agent.engine.trt.module import TrtModule
from remora_contract.errors import Refused, RequestInvalid, Unsupported
from remora_contract.trt_memory import GpuMemory

_BOARD = Path("/proc/device-tree/model")
_DRIVER = Path("/proc/driver/nvidia/version")
_POWER_MODE = Path("/var/lib/nvpmodel/status")  # "pmode:0002 fmode:…"
_MAX_BYTES = 4096


@dataclass(frozen=True)
class Gpu:
    name: str  # as CUDA calls it; on a Jetson with the board
    processor: int  # compute capability: 86 is 8.6
    memory: GpuMemory
    driver: str
    power_mode: str | None  # nvpmodel's number; None where there is none


def this_gpu(backend: str, cuda: Any = None) -> Gpu:
    """The first GPU. `cuda`: the module `cuda.bindings.runtime`, imported when not given.

    Raises Unsupported without CUDA's bindings, Refused without a GPU that the driver shows.
    """
    cuda = cuda or _bindings(backend)
    error, count = cuda.cudaGetDeviceCount()
    if int(error) != 0 or count == 0:
        raise Refused(
            f"no NVIDIA GPU ({error.name if int(error) else 'none is visible'}): backend {backend} "
            "needs one here; remora-agent doctor says what is missing, and backend onnxruntime "
            "needs none"
        )
    error, properties = cuda.cudaGetDeviceProperties(0)
    version_error, version = cuda.cudaDriverGetVersion()
    for failed in (error, version_error):
        if int(failed) != 0:
            raise Refused(f"the GPU does not answer ({failed.name}): check dmesg and nvidia-smi")
    name = properties.name.decode(errors="replace").rstrip("\0")
    return Gpu(
        " on ".join(filter(None, (name, _read(_BOARD)))),
        10 * properties.major + properties.minor,
        GpuMemory(int(properties.totalGlobalMem), bool(properties.integrated)),
        " ".join(filter(None, (f"CUDA {version}", driver_version(_read(_DRIVER))))),
        power_mode(_read(_POWER_MODE)),
    )


def driver_version(text: str) -> str:
    """`540.4.0` of /proc/driver/nvidia/version; "" when there is none."""
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else ""


def power_mode(text: str) -> str | None:
    """`2` of `pmode:0002`; None when nvpmodel has said nothing."""
    found = re.search(r"pmode:(\d+)", text)
    return str(int(found[1])) if found else None


def check_processors(module: TrtModule, processors: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending, once each: what an engine is to be built for ahead of time.

    Raises Unsupported where the backend cannot, RequestInvalid for one it does not know.
    """
    targets = module.api.targets
    if not targets:
        raise Unsupported(
            f"{module.backend} builds only for the GPU of the machine it runs on: build there "
            "without --sm, or ahead of time with --backend tensorrt_rtx"
        )
    for processor in processors:
        if processor not in targets:
            known = ", ".join(map(str, sorted(targets)))
            raise RequestInvalid(
                f"{module.backend} {module.version} cannot build for SM {processor}; it can for "
                f"{known}"
            )
    return tuple(sorted(set(processors)))


def _bindings(backend: str) -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as e:
        raise Unsupported(
            f"backend {backend} needs CUDA's bindings for Python: pip install cuda-bindings, of "
            "the major version of the CUDA that is installed"
        ) from e


def _read(path: Path) -> str:
    """ "" for a file that is not there: every machine has some of them."""
    if not path.is_file():
        return ""
    with path.open("rb") as f:
        return f.read(_MAX_BYTES).decode(errors="replace").strip("\0\n ")
