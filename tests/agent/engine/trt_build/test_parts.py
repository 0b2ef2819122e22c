"""The build's pure parts: what the builder says is judged, its phases are progress, shapes and
workspace are bounded, and what a GPU is decides which engine is wanted."""

from __future__ import annotations

import enum
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest

from remora_agent.engine.recipe import build_key
from remora_agent.engine.trt import builder, timing
from remora_agent.engine.trt import recipe as recipes
from remora_agent.engine.trt.builder import check
from remora_agent.engine.trt.files import Profile
from remora_agent.engine.trt.log import BuildLog
from remora_agent.engine.trt.module import APIS, TrtModule
from remora_agent.engine.trt.monitor import Monitor
from remora_agent.engine.trt.profiles import (
    Range,
    check_capacity,
    positions_of,
    profiles_of,
    ranges,
)
from remora_agent.engine.trt.target import (
    Gpu,
    check_processors,
    driver_version,
    power_mode,
    this_gpu,
)
from remora_contract.bundle import GRAPH_FILE, load_bundle
from remora_contract.errors import (
    ArtifactInvalid,
    EngineFault,
    Exhausted,
    Refused,
    RequestInvalid,
    Unsupported,
)
from remora_contract.memory_plan import MemoryPlan
from remora_contract.trt_memory import (
    LEAST_WORKSPACE_BYTES,
    MOST_WORKSPACE_BYTES,
    GpuMemory,
    TrtSizes,
    build_plan,
)
from tests.agent.engine.portable import FLOAT16, QWEN3, random_bundle

GIB = 1 << 30
ORIN_MEMORY = GpuMemory(32 * GIB, is_shared=True)
ORIN = Gpu("Orin on NVIDIA Jetson AGX Orin", 87, ORIN_MEMORY, "CUDA 12060 540.4.0", "0")


@pytest.fixture(scope="module")
def bundle_dir(tmp_path_factory):
    return random_bundle(tmp_path_factory.mktemp("parts") / "bundle", QWEN3, FLOAT16)


# The builder's log


def test_a_dropped_input_is_seen_behind_any_number_of_harmless_warnings():
    said = BuildLog()
    for i in range(1000):
        said.take(f"Make sure input {i} has Int64 binding.", warning=True)
    said.take("Unused Input: nonpad", warning=True)
    said.take("something new", warning=True)
    assert (said.dropped, said.unknown) == (["Unused Input: nonpad"], ["something new"])


def test_what_is_kept_of_a_talkative_builder_is_bounded():
    said = BuildLog()
    for _ in range(1000):
        said.take("x" * 10_000, error=True)
        said.take("x" * 10_000, warning=True)
    assert sum(map(len, said.errors + said.unknown)) < 60_000


def test_a_line_that_cannot_be_printed_does_not_end_the_build(capsys):
    BuildLog().take("layer \ud800 \x1b[2J", error=True)
    assert capsys.readouterr().out == "[E] layer \\ud800 \\x1b[2J\n"


def test_sizes_are_the_largest_that_the_builder_says():
    said = BuildLog()
    for size in (7, 9, 8):
        said.take(f"Total Activation Memory: {size} bytes")
    assert said.sizes == {"activation_bytes": 9}


# Its phases


def test_progress_runs_from_begin_to_end_and_never_back():
    seen: list[tuple[str, float]] = []
    monitor = Monitor(lambda *p: seen.append(p), 0.1, 0.9)
    monitor.phase_start("All", None, 2)
    for _ in range(2):
        monitor.phase_start("Part", "All", 4)
        for step in range(4):
            monitor.phase_start("Detail", "Part", 1)
            assert monitor.step_complete("Detail", 0)
            monitor.phase_finish("Detail")
            monitor.step_complete("Part", step)
        monitor.phase_finish("Part")
        monitor.step_complete("All", _)
    fractions = [f for _, f in seen]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.1 and fractions[-1] == pytest.approx(0.9)
    assert {p for p, _ in seen} == {"all", "part"}


def test_thousands_of_steps_are_few_messages():
    seen: list[float] = []
    monitor = Monitor(lambda _, f: seen.append(f), 0.0, 1.0)
    monitor.phase_start("All", None, 100_000)
    for step in range(100_000):
        monitor.step_complete("All", step)
    assert len(seen) <= 201


def test_phases_that_seem_their_own_ancestors_end():
    monitor = Monitor(lambda *_: None, 0.0, 1.0)
    monitor.phase_start("a", "b", 2)
    monitor.phase_start("b", "a", 2)
    monitor.phase_start("a", "a", 2)
    assert monitor.step_complete("a", 0)


def test_the_build_ends_when_nobody_hears_of_it_any_more():
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monitor = Monitor(broken, 0.0, 1.0)
    monitor.phase_start("All", None, 2)
    assert not monitor.step_complete("All", 0)


# Shapes


def test_prompts_are_read_in_chunks_no_longer_than_the_context():
    assert profiles_of(8, 4096) == (Profile("prefill", 1, 256), Profile("decode", 8, 1))
    assert profiles_of(8, 100)[0].tokens == 100
    with pytest.raises(RequestInvalid):
        profiles_of(0, 100)


def test_every_input_has_a_range_and_a_bank_begins_at_nothing(bundle_dir):
    graph = check(bundle_dir / GRAPH_FILE, load_bundle(bundle_dir), "native").graph
    prefill, decode = profiles_of(4, 48)
    found = ranges(graph, decode, 256, vocab=160)
    assert set(found) == {v.name for v in graph.input}
    assert found["input_ids"] == Range((1, 1), (4, 1), (4, 1))
    assert found["lora_gate.qkv"] == Range((1, 1, 0), (4, 1, 48), (4, 1, 768))
    assert found["state_index"] == found["logits_index"] == Range((1,), (4,), (4,))
    assert ranges(graph, prefill, 256, vocab=160)["input_ids"] == Range((1, 1), (1, 48), (1, 48))


def test_a_prompt_gives_logits_of_as_many_positions_as_a_bounded_part_of_memory_holds():
    prefill, decode = profiles_of(8, 4096)
    assert positions_of(prefill, vocab=160) == (256, 256)
    assert positions_of(prefill, vocab=151_936) == (256, 27)
    assert positions_of(prefill, vocab=1 << 24) == (256, 1)
    assert positions_of(decode, vocab=1 << 24) == (8, 8)


def test_a_dimension_that_no_profile_knows_is_refused():
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["q"])
    graph = onnx.helper.make_graph([], "g", [value], [])
    with pytest.raises(EngineFault, match="input x has a dimension 'q'"):
        ranges(graph, Profile("decode", 1, 1), 0, vocab=160)


def test_a_profile_beyond_the_cache_is_refused(bundle_dir):
    graph = onnx.load(str(bundle_dir / GRAPH_FILE), load_external_data=False).graph
    with pytest.raises(EngineFault, match="49 tokens exceeds the cache of 48"):
        check_capacity(graph, load_bundle(bundle_dir).graph, (Profile("prefill", 1, 49),))
    with pytest.raises(ArtifactInvalid, match="no input past_key"):
        check_capacity(onnx.GraphProto(), FLOAT16, ())


# Workspace


def test_the_workspace_is_half_of_what_the_memory_plan_leaves_within_bounds(bundle_dir):
    sizes = replace(TrtSizes.of(load_bundle(bundle_dir)), weights=GIB)

    def planned(device: int) -> MemoryPlan:
        return build_plan(sizes, 4, 48, GpuMemory(device, is_shared=True))

    rest = replace(planned(64 * GIB), workspace=0)
    assert rest == sizes.memory_plan(4, GIB, 0, chunk=48, pinned=sizes.pinned_bytes(4, 48))
    least, most = LEAST_WORKSPACE_BYTES, MOST_WORKSPACE_BYTES
    assert planned(64 * GIB).workspace == most
    assert planned(rest.total + 3 * least).workspace == 3 * least // 2
    assert planned(rest.total + 2 * least).workspace == least
    with pytest.raises(Exhausted, match=r"weights 1024 MiB, kv .*pinned 5 MiB.*MiB free"):
        planned(rest.total + 2 * least - 1)


def test_the_builder_is_given_what_the_memory_plan_says(monkeypatch, bundle_dir, tmp_path):
    bundle, gpu = load_bundle(bundle_dir), replace(ORIN, memory=GpuMemory(GIB, is_shared=True))
    monkeypatch.setattr(recipes, "load_module", lambda b: stand_in(b, "10.3.0", 0))
    monkeypatch.setattr(recipes, "this_gpu", lambda b: gpu)
    recipe = recipes.recipe("tensorrt", bundle, 4, 48)
    plan = build_plan(TrtSizes.of(bundle), 4, 48, gpu.memory)
    limits: dict[str, int] = {}
    config = SimpleNamespace(set_memory_pool_limit=limits.__setitem__)
    trt = SimpleNamespace(
        Builder=lambda logger: SimpleNamespace(create_builder_config=lambda: config),
        ProfilingVerbosity=SimpleNamespace(DETAILED=2),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(),
    )
    module: Any = TrtModule("tensorrt", trt, "10.3.0", APIS[0])
    work = builder._Work(module, BuildLog(), None, "legacy")
    work.configure(recipe.gpu, bundle, None)
    assert limits == {"workspace": plan.workspace} and 0 < plan.workspace < GIB // 2


# The GPU


class Cuda:
    """As much of `cuda.bindings.runtime` as is asked."""

    Error = enum.IntEnum("Error", {"cudaSuccess": 0, "cudaErrorInsufficientDriver": 35})

    def __init__(self, count: int = 1, error: int = 0) -> None:
        self.count, self.error = count, self.Error(error)

    def cudaGetDeviceCount(self):
        return self.error, self.count

    def cudaGetDeviceProperties(self, device: int):
        name = b"NVIDIA A10\0"
        found = {"name": name, "major": 8, "minor": 6, "totalGlobalMem": 24 * GIB, "integrated": 0}
        return self.Error(0), SimpleNamespace(**found)

    def cudaDriverGetVersion(self):
        return self.Error(0), 12060


def test_a_gpu_is_told_by_cuda():
    gpu = this_gpu("tensorrt", Cuda())
    assert gpu.name.startswith("NVIDIA A10") and gpu.driver.startswith("CUDA 12060")
    assert (gpu.processor, gpu.memory) == (86, GpuMemory(24 * GIB, is_shared=False))


@pytest.mark.parametrize(
    ("cuda", "words"), [(Cuda(0), "none is visible"), (Cuda(0, 35), "cudaErrorInsufficientDriver")]
)
def test_no_gpu_is_refused_with_what_to_do(cuda: Cuda, words: str):
    with pytest.raises(Refused, match=rf"no NVIDIA GPU \({words}\).*onnxruntime needs none"):
        this_gpu("tensorrt", cuda)


def test_missing_bindings_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(Unsupported, match="pip install cuda-bindings"):
        this_gpu("tensorrt")


def test_the_drivers_own_words_are_read():
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build"
    assert driver_version(line) == "540.4.0" and driver_version("") == ""
    assert power_mode("pmode:0002 fmode:fanNull") == "2" and power_mode("") is None


# The key


def stand_in(backend: str, version: str, row: int) -> TrtModule:
    return TrtModule(backend, ModuleType(backend), version, APIS[row])


def wanted(monkeypatch, bundle_dir, gpu: Gpu, version: str = "10.3.0", rows: int = 4) -> str:
    monkeypatch.setattr(recipes, "load_module", lambda b: stand_in(b, version, 0))
    monkeypatch.setattr(recipes, "this_gpu", lambda b: gpu)
    bundle = load_bundle(bundle_dir)
    return build_key(bundle, recipes.recipe("tensorrt", bundle, rows, 48)).digest


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Orin on NVIDIA Jetson Orin Nano"},
        {"driver": "CUDA 12060 540.5.0"},
        {"power_mode": "2"},
        {"processor": 86},
    ],
)
def test_an_engine_of_tensorrt_is_another_on_another_device(monkeypatch, bundle_dir, change):
    other = Gpu(**(vars(ORIN) | change))
    here = wanted(monkeypatch, bundle_dir, ORIN)
    assert here == wanted(monkeypatch, bundle_dir, ORIN)
    assert here != wanted(monkeypatch, bundle_dir, other)


def test_an_engine_of_tensorrt_is_another_by_version_and_rows(monkeypatch, bundle_dir):
    here = wanted(monkeypatch, bundle_dir, ORIN)
    assert here != wanted(monkeypatch, bundle_dir, ORIN, version="10.3.1")
    assert here != wanted(monkeypatch, bundle_dir, ORIN, rows=5)


def test_an_engine_of_tensorrt_rtx_depends_on_the_processor_alone(monkeypatch, bundle_dir):
    monkeypatch.setattr(recipes, "load_module", lambda b: stand_in(b, "1.7.1", 3))
    bundle, keys = load_bundle(bundle_dir), set()
    for gpu in (
        Gpu("A10", 86, GpuMemory(1, is_shared=False), "1", None),
        Gpu("RTX 3090", 86, GpuMemory(2, is_shared=True), "2", "3"),
    ):
        monkeypatch.setattr(recipes, "this_gpu", lambda b, gpu=gpu: gpu)
        keys.add(build_key(bundle, recipes.recipe("tensorrt_rtx", bundle, 4, 48)).digest)
    keys.add(build_key(bundle, recipes.recipe("tensorrt_rtx", bundle, 4, 48, (86,))).digest)
    assert len(keys) == 1


def test_ahead_of_time_is_refused_where_the_builder_measures():
    with pytest.raises(Unsupported, match="only for the GPU of the machine"):
        check_processors(stand_in("tensorrt", "11.0", 2), (86,))
    assert check_processors(stand_in("tensorrt_rtx", "1.7", 3), (89, 86, 89)) == (86, 89)


# What was measured


class Config:
    """A builder's configuration that takes only caches that begin with its name."""

    def __init__(self) -> None:
        self.cache: bytes | None = None

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        taken = not cache or cache.startswith(b"mine")
        if taken:
            self.cache = cache
        return taken

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"mine and more")


def test_measurements_are_kept_for_the_next_build(tmp_path):
    path, config = tmp_path / "kept", Config()
    timing.use(config, path)
    assert config.cache == b""
    timing.keep(config, path)
    timing.use(config, path)
    assert config.cache == b"mine and more"
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_measurements_of_another_gpu_are_dropped(tmp_path):
    path, config = tmp_path / "kept", Config()
    path.write_bytes(b"another's")
    timing.use(config, path)
    assert config.cache == b""


def test_measurements_beyond_the_bound_are_neither_read_nor_kept(tmp_path, monkeypatch):
    path, config = tmp_path / "kept", Config()
    path.write_bytes(b"mine" * 10)
    monkeypatch.setattr(timing, "MAX_BYTES", 8)
    timing.use(config, path)
    timing.keep(config, path)
    assert config.cache == b"" and path.read_bytes() == b"mine" * 10
