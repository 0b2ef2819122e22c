"""What tests and measurements for a GPU run on: a real one, or with REMORA_GPU_EMULATED=1 the
emulators, on which figures mean nothing: that tries the tests and scripts themselves.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_agent.engine.cache import CacheEntry, EngineCache
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_agent.engine.protocol import Engine
from remora_agent.engine.trt.cuda import Cuda, load_bindings
from remora_agent.engine.trt.module import TRT_BACKENDS, load_module
from remora_contract.bundle import load_bundle
from remora_contract.errors import Unsupported
from tests.support import trt_engines

EMULATED = os.environ.get("REMORA_GPU_EMULATED") == "1"
SHORTLIST = 16  # tokens a row, of emulated engines


@dataclass(frozen=True)
class GpuEngines:
    """One bundle's engine, built."""

    cuda: Cuda
    entry: CacheEntry
    open: Callable[..., Engine]


def gpu(backend: str) -> Cuda:
    """Raises Unavailable, Unsupported with what is missing."""
    if EMULATED:
        if backend != TRT_BACKENDS[0]:
            raise Unsupported(f"{TRT_BACKENDS[0]} alone is emulated, not {backend}")
        return Cuda(trt_engines.CudaEmulator())
    known: Any = backend
    load_module(known)
    cuda = Cuda(load_bindings())
    cuda.open_device()
    return cuda


def engines(backend: str, bundle_dir: Path, work: Path, rows: int = 4) -> GpuEngines:
    """Builds the bundle's engine in `work`. Raises Unavailable, Unsupported, EngineFault."""
    cuda = gpu(backend)
    if EMULATED:
        entry = trt_engines.build(bundle_dir, work / "engine", rows, shortlist=SHORTLIST)
        bench = trt_engines.Bench(bundle_dir, entry)
        return GpuEngines(Cuda(bench.cuda), entry, lambda **how: bench.open(**{"rows": rows} | how))
    named: Any = {"backend": backend}
    options = EngineOptions(rows=rows, **named)
    entry = ensure_built(bundle_dir, EngineCache(work / "engines", 1 << 40), options).entry
    bundle = load_bundle(bundle_dir)

    def open_(**how: Any) -> Engine:
        return load_engine(entry, bundle, EngineOptions(**{"rows": rows, **named, **how}))

    return GpuEngines(cuda, entry, open_)
