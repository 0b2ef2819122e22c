"""Prompts in int8: near the plain form, on one cache with it, with adapters, where allowed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.agreement import Agreement
from remora_agent.engine.build import ignore
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import (
    EngineOptions,
    ensure_built,
    int8_file,
    open_engine,
)
from remora_agent.engine.ort import builder, prefill_trial
from remora_agent.engine.ort import engine as engine_module
from remora_agent.engine.ort.engine import chunks
from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_contract.bundle import BUNDLE_JSON, GOLDEN_JSON, BundleFile, GraphSpec, load_bundle
from remora_contract.digests import canonical_json, digest_file
from remora_contract.engine_memory import engine_bytes, int8_prefill_bytes
from remora_contract.errors import EngineFault, Incompatible, RequestInvalid
from remora_contract.golden import Golden
from remora_contract.targets import AdapterTarget
from tests.agent.engine.conftest import OPTIONS as FAITHFUL
from tests.agent.engine.portable import (
    FLOAT32,
    INT4,
    LLAMA,
    QWEN2,
    Reference,
    random_adapter,
    random_bundle,
)
from tests.agent.engine.test_probe import record

OPTIONS = EngineOptions(rows=3, threads=1, prefill="int8")
PLAIN = replace(OPTIONS, prefill="plain")
LONG = np.random.default_rng(0).integers(0, 160, 40)
GRAPHS = {
    "int4": (LLAMA, INT4),
    "biased": (QWEN2, INT4),
    "everything adapted": (
        LLAMA,
        replace(INT4, dora=True, adapter_bias=True, adapt=("embed", "head")),
    ),
    "no bank": (QWEN2, replace(INT4, max_bank_rank=0)),
}


def spreads(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference in units of the first's spread."""
    return float(np.sqrt(((a - b) ** 2).mean()) / a.std())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> EngineCache:
    return EngineCache(tmp_path_factory.mktemp("engines"), 1 << 40)


@pytest.fixture(scope="module", params=GRAPHS)
def pair(request, cache, tmp_path_factory) -> Callable[[], tuple[Engine, Engine, GraphSpec]]:
    """Opens the plain and the int8 engine of one bundle."""
    spec, graph = GRAPHS[request.param]
    directory = random_bundle(tmp_path_factory.mktemp("bundle") / "b", spec, graph)

    def open_():
        return *(open_engine(directory, cache, o) for o in (PLAIN, OPTIONS)), graph

    return open_


def test_a_long_prompt_is_answered_in_int8_near_the_plain_form(pair):
    plain, int8, _ = pair()
    want, have = (engine.prefill(1, LONG, 0) for engine in (plain, int8))
    assert 0 < spreads(want, have) < 0.1


def test_answers_go_on_from_the_cache_that_int8_filled(pair):
    plain, int8, _ = pair()
    for engine in (plain, int8):
        engine.prefill(0, LONG[:30], 0)
        engine.prefill(0, LONG[30:], 30)
    for at, token in enumerate((5, 90, 7), len(LONG)):
        want, have = (e.decode([RowStep(0, token, at)])[0] for e in (plain, int8))
        assert spreads(want, have) < 0.1


def test_a_prompt_of_several_chunks_is_answered_as_one_of_one_chunk(
    pair, monkeypatch: pytest.MonkeyPatch
):
    plain, int8, _ = pair()
    want = plain.prefill(0, LONG, 0)
    monkeypatch.setattr(engine_module, "_INT8_CHUNK", 16)
    monkeypatch.setattr(engine_module, "_PREFILL_CHUNK", 16)
    assert np.abs(plain.prefill(1, LONG, 0) - want).max() < 1e-3 * want.std()
    assert 0 < spreads(want, int8.prefill(1, LONG, 0)) < 0.1


def test_short_prompts_are_computed_as_answers_are(pair):
    plain, int8, _ = pair()
    want, have = (engine.prefill(0, LONG[:15], 0) for engine in (plain, int8))
    assert np.array_equal(want, have)


def test_an_adapter_changes_an_int8_prompt_as_it_changes_a_plain_one(pair):
    plain, int8, graph = pair()
    if not graph.max_bank_rank:
        pytest.skip("no adapters")
    answers = []
    for engine in (plain, int8):
        one, two = (engine.add_adapter(_adapter(graph, seed)) for seed in (1, 2))
        mixes = ((), (MixEntry(one, 1.0),), (MixEntry(two, 1.0),))
        answers.append([engine.prefill(0, LONG, 0, mix) for mix in mixes])
        engine.remove_adapter(one)
        assert np.array_equal(engine.prefill(0, LONG, 0, mixes[2]), answers[-1][2])
        assert np.array_equal(engine.prefill(0, LONG, 0), answers[-1][0])
    for want, have in zip(*answers, strict=True):
        assert spreads(want, have) < 0.1
    base, first, second = answers[1]
    assert min(spreads(base, first), spreads(first, second)) > 0.3


def _adapter(graph: GraphSpec, seed: int) -> AdapterWeights:
    """On the layers, and on the ends where the graph takes that."""
    spec, rng = LLAMA, np.random.default_rng(seed)
    base = random_adapter(spec, seed)
    if not graph.adapt:
        return base
    ends = {
        AdapterTarget(0, "embed"): (
            rng.standard_normal((160, 2)),
            rng.standard_normal((2, 64)) / 4,
        ),
        AdapterTarget(0, "head"): (rng.standard_normal((64, 2)) / 8, rng.standard_normal((2, 160))),
    }
    both = {t: (a.astype(np.float32), b.astype(np.float32)) for t, (a, b) in ends.items()}
    return AdapterWeights(base.digest, {**base.tensors, **both})


@given(st.integers(1, 2000), st.none() | st.integers(1, 200))
def test_chunks_cover_a_prompt_in_order_and_int8_ones_are_long_enough(count, least):
    found = chunks(count, least)
    assert [begin for begin, _, _ in found] == [0, *(end for _, end, _ in found[:-1])]
    assert found[-1][1] == count and all(begin < end for begin, end, _ in found)
    for begin, end, int8 in found:
        assert int8 == (least is not None and end - begin >= least)
        assert end - begin <= (512 if least is None else 128)


def _with_golden(directory: Path, graph: GraphSpec = INT4) -> Path:
    """A bundle with prompts that its own portable graph recorded."""
    random_bundle(directory, LLAMA, graph)
    prompts = (record(Reference(directory)), record(Reference(directory), checks=8))
    (directory / GOLDEN_JSON).write_bytes(canonical_json(Golden(1, prompts)))
    path, bundle = directory / GOLDEN_JSON, load_bundle(directory)
    golden = BundleFile(GOLDEN_JSON, path.stat().st_size, digest_file(path))
    described = replace(bundle, files=(*bundle.files, golden))
    (directory / BUNDLE_JSON).write_bytes(canonical_json(described))
    return directory


def test_auto_takes_int8_where_the_golden_prompts_allow_it(tmp_path, cache):
    bundle = _with_golden(tmp_path / "b")
    auto = replace(OPTIONS, prefill="auto")
    entry = ensure_built(bundle, cache, auto).entry
    assert int8_file(entry) and "mean KL" in entry.manifest.facts["prefill_why"]
    forms = (auto, OPTIONS, PLAIN)
    found = [open_engine(bundle, cache, options).prefill(0, LONG, 0) for options in forms]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


def test_auto_is_plain_without_golden_prompts(tmp_path, cache):
    bundle = random_bundle(tmp_path / "b", LLAMA, INT4)
    entry = ensure_built(bundle, cache, replace(OPTIONS, prefill="auto")).entry
    assert not int8_file(entry) and "no golden prompts" in entry.manifest.facts["prefill_why"]
    assert not list(entry.directory.glob("prefill*"))


@pytest.mark.parametrize(("choice", "kept"), [("auto", False), ("int8", True)])
def test_an_objection_removes_int8_unless_it_was_asked_for(
    tmp_path, monkeypatch: pytest.MonkeyPatch, choice, kept: bool
):
    directory = _with_golden(tmp_path / "b")
    bad = Agreement(14, 0.5, 0.2, 0.9, 0.1)
    monkeypatch.setattr(prefill_trial, "trial", lambda *_: bad)
    out = tmp_path / "out"
    out.mkdir()
    recipe = builder.recipe(4, choice)
    facts = builder.build_ort(directory, load_bundle(directory), recipe, out, ignore)
    assert bool(facts.get("prefill")) == kept and "over 0.05" in facts["prefill_why"]
    assert bool(list(out.glob("prefill*"))) == kept


@pytest.mark.parametrize("choice", ["auto", "int8"])
def test_a_failure_of_int8_ends_only_a_build_that_asked_for_it(
    tmp_path, monkeypatch: pytest.MonkeyPatch, choice
):
    directory = _with_golden(tmp_path / "b")

    def fail(*_: object) -> Agreement:
        raise EngineFault("the kernel fell over")

    monkeypatch.setattr(prefill_trial, "trial", fail)
    out = tmp_path / "out"
    out.mkdir()
    build = partial(builder.build_ort, directory, load_bundle(directory))
    if choice == "int8":
        with pytest.raises(EngineFault, match="fell over"):
            build(builder.recipe(4, choice), out, ignore)
        return
    facts = build(builder.recipe(4, choice), out, ignore)
    assert facts["prefill_why"] == "the kernel fell over" and "prefill" not in facts
    assert not list(out.glob("prefill*")) and (out / "model.onnx").exists()


@pytest.mark.parametrize(
    ("graph", "named"), [(FLOAT32, "has float32"), (replace(FLOAT32, dtype="float16"), "float16")]
)
def test_int8_is_refused_by_name_for_float_weights(tmp_path, cache, graph, named: str):
    bundle = random_bundle(tmp_path / "b", LLAMA, graph)
    with pytest.raises(Incompatible, match=f"weights: needs int4 or int8, {named}|{named}"):
        ensure_built(bundle, cache, OPTIONS)
    plain = ensure_built(bundle, cache, PLAIN)
    assert ensure_built(bundle, cache, replace(OPTIONS, prefill="auto")).entry == plain.entry


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"prefill": "int4"}, "one of auto, int8, plain"), ({"accuracy_level": 1}, "level 1 forbids")],
)
def test_choices_that_make_no_sense_are_refused(changes, named: str):
    with pytest.raises(RequestInvalid, match=named):
        replace(OPTIONS, **changes)


def test_a_faithful_engine_never_reads_prompts_in_int8(tmp_path, cache):
    entry = ensure_built(_with_golden(tmp_path / "b"), cache, FAITHFUL).entry
    assert not int8_file(entry)


def test_auto_is_plain_where_the_memory_is_too_small_and_int8_is_refused_there(tmp_path):
    bundle_dir = _with_golden(tmp_path / "b")
    bundle = load_bundle(bundle_dir)
    answers = {}
    for room, choice in ((1 << 40, "auto"), (0, "auto"), (0, "plain")):
        settings = EngineSettings(tmp_path / "e", options=replace(OPTIONS, prefill=choice))
        source = CachedEngines(settings, available_bytes=lambda room=room: room)
        answers[room, choice] = source.load(bundle_dir).prefill(0, LONG, 0)
    assert np.array_equal(answers[0, "auto"], answers[0, "plain"])
    assert not np.array_equal(answers[0, "auto"], answers[1 << 40, "auto"])
    asked = CachedEngines(EngineSettings(tmp_path / "e", options=OPTIONS))
    left = CachedEngines(EngineSettings(tmp_path / "e", options=replace(OPTIONS, prefill="auto")))
    needs = [_needed(s, bundle_dir) for s in (asked, left)]
    assert needs[0] - needs[1] == int8_prefill_bytes(bundle.decoder)
    assert int8_prefill_bytes(bundle.decoder) < 3 * engine_bytes(bundle.decoder, bundle.graph)


def _needed(source: CachedEngines, bundle_dir: Path) -> int:
    """The least memory, in bytes, with which the engine is not refused."""
    room = range(1 << 40)
    return bisect_left(room, True, key=lambda free: not source.memory_refusals(bundle_dir, free))
