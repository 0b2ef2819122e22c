"""The Python modules that build and run TensorRT engines, and where they differ: one table.

A row holds from its version up to the module's next row. What all of them share (name-based
bindings, IProgressMonitor, `device_memory_size_v2`, the WORKSPACE pool, the engine inspector) is
called as it is, without a column. A version before a module's first row is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

from remora_contract.errors import Unsupported
from remora_contract.versions import version_numbers

TrtBackend = Literal["tensorrt", "tensorrt_rtx"]
TRT_BACKENDS: tuple[TrtBackend, ...] = ("tensorrt", "tensorrt_rtx")
INSTALL: Mapping[str, str] = {
    "tensorrt": "it comes with JetPack on a Jetson (python3-libnvinfer); elsewhere: "
    "pip install tensorrt",
    "tensorrt_rtx": "pip install 'remora[tensorrt]'",
}


@dataclass(frozen=True)
class Api:
    """A module's interface from version `since` on."""

    backend: TrtBackend
    since: tuple[int, int]
    # "flag": networks are strongly typed when NetworkDefinitionCreationFlag.STRONGLY_TYPED says so;
    # "always": there is no other kind, and the flag may be gone.
    strong_typing: Literal["flag", "always"]
    # Compute capabilities (86 for 8.6) that an engine can be built for without such a GPU, by
    # IBuilderConfig.set_compute_capability; empty: only for the GPU that builds.
    targets: tuple[int, ...]
    # The processor of whoever built does not matter: kernels are made where the engine is loaded.
    portable: bool
    # ITimingCache keeps what the builder measured. With TensorRT for RTX it changes nothing and
    # asks for a GPU.
    timing_cache: bool
    # IRuntimeConfig.create_runtime_cache keeps kernels compiled at load.
    runtime_cache: bool
    # ICudaEngine.get_aliased_input_tensor tells which output lies in which input.
    aliased_outputs: bool
    # BuilderFlag.REQUIRE_USER_ALLOCATION: without it layers may take memory while they run, which
    # no plan knows of and no capture allows.
    user_allocation: bool


APIS: tuple[Api, ...] = (
    Api("tensorrt", (10, 3), "flag", (), False, True, False, False, False),
    Api("tensorrt", (10, 15), "flag", (), False, True, False, True, False),
    Api("tensorrt", (11, 0), "always", (), False, True, False, True, False),
    Api("tensorrt_rtx", (1, 7), "flag", (75, 80, 86, 89, 120, 121), True, False, True, True, True),
)


@dataclass(frozen=True)
class TrtModule:
    """An imported module and what its version can do."""

    backend: TrtBackend
    trt: ModuleType
    version: str
    api: Api


def api_of(backend: TrtBackend, version: str) -> Api:
    """The table's row. Raises Unsupported for a version that is older than the table."""
    numbers = version_numbers(version)
    rows = [a for a in APIS if a.backend == backend and a.since <= numbers]
    if not rows:
        oldest = min(a.since for a in APIS if a.backend == backend)
        raise Unsupported(
            f"{backend} {version} is older than {oldest[0]}.{oldest[1]}, the first that Remora "
            f"builds and runs engines with; install a newer one ({INSTALL[backend]})"
        )
    return max(rows, key=lambda a: a.since)


def load_module(backend: TrtBackend) -> TrtModule:
    """Imports it. Raises Unsupported with what to install, or when its version is not known."""
    try:
        module = import_module(backend)
    except ImportError as e:
        raise Unsupported(
            f"the Python module {backend} cannot be imported ({_first_line(e)}): {INSTALL[backend]}"
        ) from e
    version = str(module.__version__)
    return TrtModule(backend, module, version, api_of(backend, version))


def _first_line(error: ImportError) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
