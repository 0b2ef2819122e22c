"""A bundle with two graphs: the native one first, the legacy one where TensorRT has no kernel. The
failures are those of the real TensorRT for RTX, ahead of time and without a GPU.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import onnx
import pytest

from remora_agent.engine import opening
from remora_agent.engine.build import BuildControl, BuildResult, build_engine
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, build_first, recipes_of
from remora_agent.engine.recipe import build_key
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_contract.bundle import GRAPH_FILE, LEGACY_GRAPH_FILE, load_bundle
from remora_contract.errors import ArtifactInvalid, EngineFault, NoFusedKernel
from tests.agent.engine.portable import (
    FLOAT16,
    FLOAT32,
    QWEN3,
    random_bundle,
    write_bundle_json,
)
from tests.agent.engine.trt_build.test_command import run

needs_rtx = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None,
    reason="tensorrt-rtx is not installed: pip install 'remora[tensorrt]'",
)
OPTIONS = EngineOptions(rows=2, backend="tensorrt_rtx")
SM = (86,)


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines", 1 << 40)


@pytest.fixture
def without_kernel(tmp_path: Path) -> Path:
    """TensorRT has no float32 kernel for Attention: its builder refuses the native graph."""
    return random_bundle(tmp_path / "float32", QWEN3, FLOAT32, both=True)


@pytest.fixture
def taken(tmp_path: Path) -> Path:
    return random_bundle(tmp_path / "float16", QWEN3, FLOAT16, both=True)


def built(bundle_dir: Path, cache: EngineCache, **control) -> BuildResult:
    bundle = load_bundle(bundle_dir)
    recipes = recipes_of(bundle, OPTIONS, SM)
    return build_first(bundle_dir, bundle, recipes, cache, BuildControl(**control))


def refused_by_the_parser(bundle_dir: Path) -> None:
    """An attribute that our rules let pass and TensorRT's parser does not know."""
    path = bundle_dir / GRAPH_FILE
    model = onnx.load(str(path), load_external_data=False)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute("softmax_precision", 1))
    path.write_bytes(model.SerializeToString())
    write_bundle_json(bundle_dir, QWEN3, FLOAT16)


@needs_rtx
def test_a_native_graph_that_builds_is_built_and_the_legacy_one_left_alone(
    taken: Path, cache: EngineCache, tmp_path: Path
):
    result = built(taken, cache)
    recipe = result.entry.manifest.key.recipe
    assert (recipe.dialect, result.instead_of) == (None, "")
    assert "ATTENTION_INPUT" in result.entry.manifest.facts["layers"]
    assert len(cache.stored()) == 1
    # The same engine as of a bundle that has the native graph alone.
    alone = load_bundle(random_bundle(tmp_path / "alone", QWEN3, FLOAT16))
    (only,) = recipes_of(alone, OPTIONS, SM)
    assert build_key(alone, only).digest == result.entry.manifest.key.digest


@needs_rtx
@pytest.mark.parametrize("refusing", ["builder", "parser"])
def test_without_a_fused_kernel_the_legacy_graph_is_built_and_everyone_is_told(
    request: pytest.FixtureRequest,
    cache: EngineCache,
    caplog: pytest.LogCaptureFixture,
    refusing: str,
):
    bundle = request.getfixturevalue("without_kernel" if refusing == "builder" else "taken")
    if refusing == "parser":
        refused_by_the_parser(bundle)
    seen: list[tuple[str, float]] = []
    with caplog.at_level(logging.WARNING):
        result = built(bundle, cache, progress=lambda *p: seen.append(p))
    recipe = result.entry.manifest.key.recipe
    assert recipe.dialect == "legacy"
    assert "has no fused attention" in result.instead_of
    layers = json.loads(result.entry.manifest.facts["layers"])
    assert "ATTENTION_INPUT" not in layers and layers["SOFTMAX"] == QWEN3.layers
    assert "engine.second_graph" in caplog.messages
    assert "building the legacy graph instead" in {phase for phase, _ in seen}
    fractions = [f for _, f in seen]
    assert fractions == sorted(fractions)
    # Kept with the engine: nobody tries the native graph again, and the reason is still known.
    again = built(bundle, cache)
    assert again.from_cache and again.entry == result.entry
    assert again.instead_of == result.instead_of
    assert len(cache.stored()) == 1


@needs_rtx
def test_any_other_fault_of_the_native_graph_is_no_reason_to_build_the_legacy_one(
    taken: Path, cache: EngineCache
):
    path = taken / GRAPH_FILE
    model = onnx.load(str(path), load_external_data=False)
    extra = onnx.helper.make_tensor_value_info("past_key.9", onnx.TensorProto.FLOAT16, ["b", 1])
    model.graph.input.append(extra)
    path.write_bytes(model.SerializeToString())
    write_bundle_json(taken, QWEN3, FLOAT16)
    with pytest.raises(EngineFault):
        built(taken, cache)
    assert cache.stored() == []


@needs_rtx
def test_a_legacy_graph_that_fails_too_is_the_error(without_kernel: Path, cache: EngineCache):
    path = without_kernel / LEGACY_GRAPH_FILE
    model = onnx.load(str(path), load_external_data=False)
    next(n for n in model.graph.node if n.op_type == "Softmax").op_type = "LogSoftmax"
    path.write_bytes(model.SerializeToString())
    write_bundle_json(without_kernel, QWEN3, FLOAT32)
    with pytest.raises(EngineFault, match=r"model\.legacy\.onnx breaks the rules.*LogSoftmax"):
        built(without_kernel, cache)
    assert cache.stored() == []


@needs_rtx
def test_a_damaged_second_graph_is_found_before_it_is_read(
    without_kernel: Path, cache: EngineCache
):
    with (without_kernel / LEGACY_GRAPH_FILE).open("r+b") as graph:
        graph.seek(100)
        graph.write(b"\0\0\0\0")
    with pytest.raises(ArtifactInvalid, match=r"model\.legacy\.onnx is damaged"):
        built(without_kernel, cache)


@needs_rtx
def test_the_keys_of_the_graphs_differ_and_a_shipped_engine_of_either_fits(
    without_kernel: Path, cache: EngineCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A device of the class for which the engine was built ahead of time."""
    bundle = load_bundle(without_kernel)
    recipes = recipes_of(bundle, OPTIONS, SM)
    keys = [build_key(bundle, recipe) for recipe in recipes]
    assert [k.recipe.dialect for k in keys] == [None, "legacy"]
    assert LEGACY_GRAPH_FILE in {f.path for f in keys[1].files}
    shipped = built(without_kernel, cache).entry.directory
    monkeypatch.setattr(opening, "recipe_of", lambda *_: recipes[0])
    monkeypatch.setattr(CachedEngines, "_prove", lambda *_: None)  # no GPU loads it
    device = CachedEngines(EngineSettings(tmp_path / "device", options=OPTIONS))
    wanted = device.wanted(without_kernel)
    assert wanted is not None and len(wanted.others) == 1
    outcome = device.build(without_kernel, lambda *_: None, [shipped])
    assert (outcome.source, outcome.dialect) == ("shipped", "legacy")
    assert "has no fused attention" in outcome.why
    assert device.missing(without_kernel) is None and device.wanted(without_kernel) is None
    assert device.built(without_kernel) is not None


def test_one_graph_alone_ends_with_what_to_export(tmp_path: Path, cache: EngineCache):
    pytest.importorskip("tensorrt_rtx")
    bundle_dir = random_bundle(tmp_path / "one", QWEN3, FLOAT32)
    with pytest.raises(NoFusedKernel, match="--dialect both or legacy"):
        built(bundle_dir, cache)


def test_onnx_runtime_builds_the_native_graph_and_gives_the_same_engine(
    taken: Path, tmp_path: Path, cache: EngineCache
):
    options = EngineOptions(rows=1)
    bundle = load_bundle(taken)
    (recipe,) = recipes_of(bundle, options)
    result = build_engine(taken, bundle, recipe, cache, BuildControl())
    alone = random_bundle(tmp_path / "alone", QWEN3, FLOAT16)
    assert opening.ensure_built(alone, cache, options).from_cache
    assert result.entry.manifest.key.recipe.dialect is None


@needs_rtx
@pytest.mark.parametrize("command", [("remora_agent", "build"), ("remora_build", "engine")])
def test_the_commands_say_which_graph_was_built_and_why(
    without_kernel: Path, tmp_path: Path, command: tuple[str, str]
):
    options = ["--backend", "tensorrt_rtx", "--sm", 86]

    def to(name: str) -> list[object]:
        return [*options, *(["--out", tmp_path / name] if command[0] == "remora_build" else [])]

    ended = run(*command, without_kernel, *to("a"), "--json", home=tmp_path)
    assert ended.returncode == 0, ended.stderr
    made = json.loads(ended.stdout)
    assert made["dialect"] == "legacy" and "no fused attention" in made["instead_of"]
    table = run(*command, without_kernel, *to("b"), home=tmp_path)
    assert "legacy graph, from the cache" in table.stdout
    assert "not of the native graph" in table.stdout


def test_a_recipe_of_a_graph_that_the_bundle_has_not_is_refused(tmp_path: Path):
    bundle = load_bundle(random_bundle(tmp_path / "one", QWEN3, FLOAT16))
    (recipe,) = recipes_of(bundle, EngineOptions(rows=1))
    with pytest.raises(ArtifactInvalid, match="--dialect both"):
        build_key(bundle, replace(recipe, dialect="legacy"))
