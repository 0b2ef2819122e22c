"""Built engines, one build per worker and case, loaded anew for every test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from remora_agent.engine.cache import CacheEntry, EngineCache
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_agent.engine.protocol import Engine
from remora_agent.engine.trt.module import TRT_BACKENDS
from remora_contract.bundle import GraphSpec, load_bundle
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import Unavailable, Unsupported
from tests.agent.engine.portable import (
    EVERYTHING,
    FLOAT32,
    INT4,
    LLAMA,
    MOE,
    NO_BANK,
    QWEN2,
    QWEN3,
    Reference,
    in_legacy,
    random_bundle,
)
from tests.support import gpu, trt_engines

OPTIONS = EngineOptions(rows=4, threads=1, accuracy_level=1)


@dataclass(frozen=True)
class Case:
    """A backend's way of running one kind of bundle."""

    spec: DecoderSpec
    graph: GraphSpec
    base_graph: bool = True  # False: as ONNX Runtime 1.23 builds int4
    backend: str = "onnxruntime"  # others run on an emulated GPU
    gpu: bool = False  # on a real one: for `pytest -m gpu`


CASES = {
    "ort-float32": Case(QWEN2, FLOAT32),
    "ort-int4": Case(LLAMA, INT4),
    "ort-qk-norm": Case(QWEN3, FLOAT32),
    "ort-one-graph": Case(QWEN3, INT4, base_graph=False),
    "tensorrt-float32": Case(QWEN2, FLOAT32, backend="tensorrt"),
    "tensorrt-int4": Case(LLAMA, INT4, backend="tensorrt"),
    "tensorrt-every-input": Case(QWEN2, EVERYTHING, backend="tensorrt"),
}
# No fused attention exists for float32, so the graphs are of the legacy dialect; float16 is in
# test_gpu.py, whose tolerance is its own.
GPU_CASES = {
    f"gpu-{backend}-{name}": Case(spec, in_legacy(graph), backend=backend, gpu=True)
    for backend in TRT_BACKENDS
    for name, spec, graph in (("float32", QWEN2, FLOAT32), ("int4", LLAMA, INT4))
}
# With every input that an adapter may have within the layers; for test_conformance_bank.py.
BANK_CASES = {
    "ort-everything": Case(QWEN2, EVERYTHING),
    "ort-experts": Case(MOE, EVERYTHING),
    "tensorrt-everything": Case(QWEN2, EVERYTHING, backend="tensorrt"),
    "tensorrt-experts": Case(MOE, EVERYTHING, backend="tensorrt"),
    "tensorrt-legacy-experts": Case(MOE, in_legacy(EVERYTHING), backend="tensorrt"),
}
GPU_BANK_CASES = {
    f"gpu-{backend}-{name}": Case(spec, in_legacy(EVERYTHING), backend=backend, gpu=True)
    for backend in TRT_BACKENDS
    for name, spec in (("everything", QWEN2), ("experts", MOE))
}
GPU_CLOSE = 5e-4  # float32 sums in another order, beside what emulated engines get


@dataclass(frozen=True)
class Bench:
    """A built engine beside the portable graph it must agree with."""

    case: Case
    bundle_dir: Path
    reference: Reference
    open: Callable[..., Engine]

    @property
    def spec(self) -> DecoderSpec:
        return self.case.spec


@pytest.fixture(scope="session")
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"), 1 << 40)


@pytest.fixture(scope="session")
def make_bench(
    tmp_path_factory: pytest.TempPathFactory, engine_cache: EngineCache
) -> Callable[[Case], Bench]:
    made: dict[Case, Bench] = {}

    def make(case: Case) -> Bench:
        if case not in made:
            made[case] = _bench(case, tmp_path_factory.mktemp("bundle") / "b", engine_cache)
        return made[case]

    return make


def _bench(case: Case, directory: Path, cache: EngineCache) -> Bench:
    random_bundle(directory, case.spec, case.graph)
    if case.gpu:
        return Bench(case, directory, Reference(directory), _on_gpu(case, directory))
    if case.backend == "tensorrt":
        entry = trt_engines.build(directory, directory.parent / "trt")
        return Bench(case, directory, Reference(directory), _emulated(directory, entry))
    entry = ensure_built(directory, cache, OPTIONS).entry
    if not case.base_graph:
        entry = CacheEntry(entry.directory, replace(entry.manifest, facts={"base": ""}))

    def open_(**changes: object) -> Engine:
        return load_engine(entry, load_bundle(directory), replace(OPTIONS, **changes))

    return Bench(case, directory, Reference(directory), open_)


def _emulated(directory: Path, entry: CacheEntry) -> Callable[..., Engine]:
    """Each engine on a GPU of its own."""

    def open_(**changes: object) -> Engine:
        return trt_engines.Bench(directory, entry).open(**changes)

    return open_


def _on_gpu(case: Case, directory: Path) -> Callable[..., Engine]:
    try:
        return gpu.engines(case.backend, directory, directory.parent).open
    except (Unavailable, Unsupported) as e:
        pytest.skip(str(e))


@pytest.fixture(
    params=[*CASES, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_CASES)],
    scope="session",
)
def bench(request: pytest.FixtureRequest, make_bench: Callable[[Case], Bench]) -> Bench:
    return make_bench((CASES | GPU_CASES)[request.param])


@pytest.fixture(autouse=True)
def _tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The conformance suite's, on a real GPU."""
    if "bench" in request.fixturenames and "test_conformance" in request.module.__name__:
        bench: Bench = request.getfixturevalue("bench")
        if bench.case.gpu:
            for module in (request.module, sys.modules[f"{__package__}.test_conformance_rows"]):
                monkeypatch.setattr(module, "CLOSE", GPU_CLOSE, raising=False)


@pytest.fixture
def engine(bench: Bench) -> Iterator[Engine]:
    engine = bench.open()
    yield engine
    engine.close()


@pytest.fixture
def bankless(make_bench: Callable[[Case], Bench]) -> Iterator[Engine]:
    """An engine of a bundle exported without a bank."""
    engine = make_bench(Case(QWEN2, NO_BANK)).open()
    yield engine
    engine.close()
