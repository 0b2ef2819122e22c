"""The Python modules that build and run TensorRT engines, and where they differ: one table.

A row holds from its version up to the module's next row. What all of them share (name-based
bindings, IProgressMonitor, `device_memory_size_v2`, `set_device_memory` with a size, the WORKSPACE
pool, BuilderFlag.TF32, profiling verbosity, the engine inspector, contexts of an allocation
strategy) is called as it is, without a column. A version before a module's first row is refused.

Held against the sources of the Python bindings, `python/src/infer/pyCore.cpp` and
`python/docstrings/infer/pyCoreDoc.h` of github.com/NVIDIA/TensorRT at v10.3.0, v10.15, v10.16,
v11.0 and v11.1, and for `tensorrt_rtx` against the wheel 1.7.1:
- STRONGLY_TYPED is in all; since 11.0 it is "deprecated ... retained for API compatibility but is
  ignored". The flags of weak typing (FP16, INT8) and EXPLICIT_BATCH are gone from 11.0 on.
- IRuntimeConfig came with 10.12 at the latest, create_runtime_cache only with `tensorrt_rtx`.
- get_aliased_input_tensor came with 10.15; REQUIRE_USER_ALLOCATION is not in `tensorrt` up to 11.1.
- IStreamReader is gone from 11.0 on (V2 since 10.9 at the latest), as are `supports_model` and the
  sizes without _v2; none of them is used. Engines are never refitted, nor have they plugins.
- The inspector's JSON has "I/O Tensors" for "Bindings" from 11.0 on ("Migrating IEngineInspector
  Usage from TensorRT 10.x to 11.x"); "Layers", which is read, stayed.
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
    # "always": there is no other kind, and the flag is ignored.
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
