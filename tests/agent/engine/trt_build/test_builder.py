"""Engines by the real TensorRT for RTX, ahead of time and without a GPU, and what goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import psutil
import pytest

from remora_agent.engine.build import BuildControl, BuildResult, build_engine
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.child import ChildLimits
from remora_agent.engine.opening import EngineOptions, ensure_built, recipe_of
from remora_agent.engine.trt import sampling
from remora_agent.engine.trt.files import PLAN, read
from remora_contract.bundle import GRAPH_FILE, load_bundle
from remora_contract.errors import (
    Cancelled,
    EngineFault,
    Exhausted,
    NoFusedKernel,
    Refused,
    RemoraError,
)
from remora_contract.trt_memory import SamplingSize
from tests.agent.engine.portable import FLOAT16, FLOAT32, QWEN3, random_bundle, write_bundle_json

pytestmark = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install 'remora[tensorrt]'",
)
OPTIONS = EngineOptions(rows=3, backend="tensorrt_rtx")
SM = (89, 86)
CRASHING = (190, 196, 333)  # seeds of damage that ends TensorRT for RTX 1.7's parser by a signal


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", 1 << 40)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return random_bundle(tmp_path / "bundle", QWEN3, FLOAT16)


def built(bundle_dir: Path, cache: EngineCache, **control) -> BuildResult:
    loaded = load_bundle(bundle_dir)
    recipe = recipe_of(loaded, OPTIONS, SM)
    return build_engine(bundle_dir, loaded, recipe, cache, BuildControl(**control))


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def changed(bundle_dir: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    """The graph as a fault would have left it, described by bundle.json as it is now."""
    path = bundle_dir / GRAPH_FILE
    model = onnx.load(str(path), load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
    write_bundle_json(bundle_dir, QWEN3, FLOAT16)


def test_an_engine_for_two_processors_says_what_it_takes_and_the_next_build_is_a_hit(
    bundle: Path, cache: EngineCache
):
    seen: list[tuple[str, float]] = []
    first = built(bundle, cache, progress=lambda *p: seen.append(p))
    again = built(bundle, cache)
    assert again.from_cache and not first.from_cache
    manifest = first.entry.manifest
    assert manifest.key.recipe.gpu is not None
    assert manifest.key.recipe.gpu.processors == (86, 89)
    assert (first.entry.directory / PLAN).stat().st_size > 1000
    assert {f.path for f in manifest.files} == {PLAN, sampling.PLAN}
    size = sampling.size_of(manifest.facts, QWEN3.vocab, "test")
    assert size == SamplingSize(QWEN3.vocab, min(256, QWEN3.vocab), 1024)
    facts = read(manifest.facts, "test")
    assert [(p.kind, p.rows, p.tokens) for p in facts.profiles] == [
        ("prefill", 1, 48),
        ("decode", 3, 1),
    ]
    assert json.loads(manifest.facts["layers"])["KV_CACHE_UPDATE"] == 2 * QWEN3.layers
    fractions = [f for _, f in seen]
    assert fractions == sorted(fractions) and fractions[-1] > 0.9
    assert json.loads(manifest.facts["warnings"]) == []


def test_rows_and_processors_are_parts_of_the_key(bundle: Path):
    loaded = load_bundle(bundle)
    keys = [
        recipe_of(loaded, OPTIONS, SM),
        recipe_of(loaded, OPTIONS, (86,)),
        recipe_of(loaded, replace(OPTIONS, rows=4), SM),
    ]
    assert len(set(keys)) == 3
    assert recipe_of(loaded, OPTIONS, (86, 89, 86)) == keys[0]


def test_an_attention_without_a_kernel_is_told_apart(tmp_path: Path, cache: EngineCache):
    bundle = random_bundle(tmp_path / "float32", QWEN3, FLOAT32)
    with pytest.raises(NoFusedKernel, match="no fused attention for the native graph"):
        built(bundle, cache)
    assert cache.stored() == []


def test_without_a_gpu_an_engine_for_this_machine_is_refused(bundle: Path, cache: EngineCache):
    with pytest.raises(Refused, match=r"no NVIDIA GPU.*cudaError"):
        ensure_built(bundle, cache, OPTIONS)


def test_a_processor_that_the_builder_does_not_know_is_named_with_those_it_does(bundle: Path):
    with pytest.raises(Exception, match=r"SM 87; it can for 75, 80, 86"):
        recipe_of(load_bundle(bundle), OPTIONS, (87,))


def test_a_cancelled_build_ends_and_leaves_nothing(bundle: Path, cache: EngineCache):
    stop = threading.Event()

    def progress(phase: str, done: float) -> None:
        if "building" in phase:
            stop.set()

    with pytest.raises(Cancelled):
        built(bundle, cache, progress=progress, cancelled=stop.is_set)
    assert cache.stored() == [] and not list((cache.root / "tmp").iterdir())


def test_a_build_that_takes_too_long_is_stopped(bundle: Path, cache: EngineCache):
    with pytest.raises(Exhausted, match="time limit"):
        built(bundle, cache, limits=ChildLimits(wall_s=0.2))
    assert cache.stored() == []


def test_a_builder_that_dies_by_a_signal_is_reported_with_it_and_its_last_words(
    bundle: Path, cache: EngineCache
):
    """As a crash of the parser looks from outside."""

    killed: list[int] = []

    def progress(phase: str, done: float) -> None:
        if "building" in phase and not killed:
            children = [c for c in psutil.Process().children() if "build_child" in _command(c)]
            for child in children:
                os.kill(child.pid, signal.SIGSEGV)
            killed.extend(c.pid for c in children)

    with pytest.raises(EngineFault, match="SIGSEGV"):
        built(bundle, cache, progress=progress)
    assert cache.stored() == []


def test_a_graph_that_breaks_our_rules_reaches_no_parser(bundle: Path, cache: EngineCache):
    def upper_left(model: onnx.ModelProto) -> None:
        node = next(n for n in model.graph.node if n.op_type == "Attention")
        node.attribute.append(onnx.helper.make_attribute("is_causal", 1))

    changed(bundle, upper_left)
    with pytest.raises(EngineFault, match="is_causal"):
        built(bundle, cache)


def test_an_input_that_nothing_reads_is_an_error(bundle: Path, cache: EngineCache):
    def unread(model: onnx.ModelProto) -> None:
        extra = onnx.helper.make_tensor_value_info("past_key.9", onnx.TensorProto.FLOAT16, ["b", 1])
        model.graph.input.append(extra)

    changed(bundle, unread)
    with pytest.raises(EngineFault, match=r"past_key\.9|unused|inputs"):
        built(bundle, cache)


def test_a_cache_of_another_size_than_the_bundle_says_is_refused(bundle: Path, cache: EngineCache):
    write_bundle_json(bundle, QWEN3, replace(FLOAT16, context=40))
    with pytest.raises(Exception, match="holds 40 tokens, the graph's holds 48"):
        built(bundle, cache)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [*range(16), *CRASHING])
def test_a_damaged_graph_ends_with_an_error_or_an_engine_and_never_takes_the_agent_down(
    bundle: Path, cache: EngineCache, seed: int
):
    """Bytes flipped past the digests, which are written again: parser and checker see them."""
    rng = random.Random(seed)
    path = bundle / GRAPH_FILE
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    write_bundle_json(bundle, QWEN3, FLOAT16)
    try:
        result = built(bundle, cache)
    except RemoraError as e:
        assert str(e)
        assert cache.stored() == []
    else:
        assert (result.entry.directory / PLAN).stat().st_size > 1000
    assert not list((cache.root / "tmp").iterdir())
