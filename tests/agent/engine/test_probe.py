"""An engine serves only when it answers as its bundle was recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remora_agent.engine.cache import EngineCache
from remora_agent.engine.child import ChildLimits
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_agent.engine.probe import (
    FLOAT16_TOLERANCE,
    FLOAT32_TOLERANCE,
    INT8_ACTIVATIONS_TOLERANCE,
    load_golden,
    probe_in_child,
    prove,
    tolerance_of,
)
from remora_agent.engine.protocol import Engine
from remora_contract.bundle import GOLDEN_JSON, load_bundle
from remora_contract.digests import canonical_json
from remora_contract.errors import ArtifactInvalid, EngineFault, Refused
from remora_contract.golden import Golden, GoldenPrompt
from tests.agent.engine.conftest import Bench
from tests.agent.engine.portable import (
    FLOAT16,
    FLOAT32,
    INT4,
    QWEN2,
    Reference,
    random_bundle,
)
from tests.support.adapters import random_tensors, write_sidecar

OPTIONS = EngineOptions(rows=1, threads=1, accuracy_level=1)
TOKENS = (3, 99, 41, 7, 7, 120, 5, 66, 2, 88)


def record(reference: Reference, tokens: tuple[int, ...] = TOKENS, checks: int = 6) -> GoldenPrompt:
    found = [
        reference.logits(list(tokens[: i + 1])) for i in range(len(tokens) - checks, len(tokens))
    ]
    tops = [np.sort(row)[-2:] for row in found]
    return GoldenPrompt(
        tokens,
        tuple(int(row.argmax()) for row in found),
        tuple(float(t[1]) for t in tops),
        tuple(float(t[1] - t[0]) for t in tops),
    )


def test_an_engine_that_agrees_is_proven(bench: Bench, engine: Engine):
    golden = Golden(1, (record(bench.reference), record(bench.reference, TOKENS[::-1], 10)))
    assert prove(engine, golden, FLOAT32_TOLERANCE) == 16


def test_a_wrong_token_is_named_with_prompt_and_position(bench: Bench, engine: Engine):
    good = record(bench.reference)
    expected = [*good.expected]
    expected[2] = (expected[2] + 1) % bench.spec.vocab
    golden = Golden(1, (good, replace(good, expected=tuple(expected))))
    with pytest.raises(EngineFault, match=r"golden prompt 1, position 6.*answers token"):
        prove(engine, golden, FLOAT32_TOLERANCE)


def test_a_logit_too_far_from_its_recording_is_a_fault(bench: Bench, engine: Engine):
    good = record(bench.reference)
    golden = Golden(1, (replace(good, logit=(*good.logit[:-1], good.logit[-1] + 0.5)),))
    with pytest.raises(EngineFault, match=r"position 9.*recorded"):
        prove(engine, golden, FLOAT32_TOLERANCE)


def test_a_near_tie_may_fall_either_way(bench: Bench, engine: Engine):
    good = record(bench.reference)
    runner_up = [int(np.argsort(bench.reference.logits(list(TOKENS)))[-2])]
    lost = good.margin[-1]
    tied = replace(
        good,
        expected=(*good.expected[:-1], *runner_up),
        logit=(*good.logit[:-1], good.logit[-1] - lost),
    )
    spread = float(bench.reference.logits(list(TOKENS)).std())
    generous = replace(FLOAT32_TOLERANCE, spreads=0.6 * lost / spread)
    assert prove(engine, Golden(1, (tied,)), generous) == 6
    strict = replace(FLOAT32_TOLERANCE, spreads=0.4 * lost / spread)
    with pytest.raises(EngineFault, match="answers token"):
        prove(engine, Golden(1, (tied,)), strict)


@pytest.mark.parametrize(("wrong", "proven"), [(1, True), (2, False)])
def test_a_share_of_positions_may_fall_out_where_experts_are_chosen(
    bench: Bench, engine: Engine, wrong: int, proven: bool
):
    good = record(bench.reference)
    expected = [(t + (i < wrong)) % bench.spec.vocab for i, t in enumerate(good.expected)]
    golden = Golden(1, (replace(good, expected=tuple(expected)),))
    routed = replace(FLOAT32_TOLERANCE, outliers=0.25)
    if proven:
        assert prove(engine, golden, routed) == 6
    else:
        with pytest.raises(EngineFault, match=r"position 4.*answers token"):
            prove(engine, golden, routed)


@pytest.mark.parametrize("prompts", [0, 1])
def test_an_engine_that_could_not_be_checked_is_not_proven(
    bench: Bench, engine: Engine, prompts: int
):
    long = tuple(range(engine.limits.context + 1))
    golden = Golden(1, (GoldenPrompt(long, (1,), (0.0,), (1.0,)),) * prompts)
    with pytest.raises(EngineFault, match="not proven"):
        prove(engine, golden, FLOAT32_TOLERANCE)


def test_a_token_that_the_model_has_not_is_a_fault(bench: Bench, engine: Engine):
    golden = Golden(1, (replace(record(bench.reference), expected=(9999,) * 6),))
    with pytest.raises(EngineFault, match="9999"):
        prove(engine, golden, FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("graph", "level", "tolerance"),
    [
        (FLOAT32, 4, FLOAT32_TOLERANCE),
        (FLOAT16, 4, FLOAT16_TOLERANCE),
        (INT4, 1, FLOAT32_TOLERANCE),
        (INT4, 4, INT8_ACTIVATIONS_TOLERANCE),
    ],
)
def test_the_tolerance_follows_the_numeric_form(bench: Bench, graph, level: int, tolerance):
    bundle = replace(load_bundle(bench.bundle_dir), graph=graph)
    assert tolerance_of(bundle, replace(OPTIONS, accuracy_level=level)) == tolerance


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EngineCache]:
    root = tmp_path_factory.mktemp("probe")
    directory = random_bundle(root / "bundle", QWEN2, INT4)
    golden = Golden(1, (record(Reference(directory)),))
    (directory / GOLDEN_JSON).write_bytes(canonical_json(golden))
    return directory, EngineCache(root / "engines", 1 << 40)


@pytest.mark.parametrize("level", [1, 4])
def test_a_child_proves_engine_and_adapters(
    world: tuple[Path, EngineCache], tmp_path: Path, level: int
):
    directory, cache = world
    options = replace(OPTIONS, accuracy_level=level, context=32)
    entry = ensure_built(directory, cache, options).entry
    base = load_bundle(directory).base_digest
    write_sidecar(tmp_path / "adapter", base, random_tensors(QWEN2, seed=1))
    adapters = [tmp_path / "adapter"]
    args = (entry, directory, adapters, options, tmp_path / "log", ChildLimits())
    assert probe_in_child(*args) == 6


def test_a_childs_verdict_and_refusals_arrive(world: tuple[Path, EngineCache], tmp_path: Path):
    directory, cache = world
    entry = ensure_built(directory, cache, OPTIONS).entry
    write_sidecar(tmp_path / "foreign", "sha256:" + "0" * 64, random_tensors(QWEN2, seed=1))
    with pytest.raises(Refused, match="adapter_base"):
        probe_in_child(
            entry, directory, [tmp_path / "foreign"], OPTIONS, tmp_path / "log", ChildLimits()
        )


def test_a_bundle_without_golden_prompts_says_so(tmp_path: Path):
    with pytest.raises(ArtifactInvalid, match=GOLDEN_JSON):
        load_golden(tmp_path)


def test_level_4_moves_logits_less_than_its_tolerance_on_random_weights(
    world: tuple[Path, EngineCache],
):
    """The stated tolerance has room: the measured shift is below half of it."""
    directory, cache = world
    options = replace(OPTIONS, accuracy_level=4)
    engine = load_engine(
        ensure_built(directory, cache, options).entry, load_bundle(directory), options
    )
    logits = engine.prefill(0, np.array(TOKENS), 0)
    wanted = Reference(directory).logits(list(TOKENS))
    engine.close()
    assert np.abs(logits - wanted).max() < 0.5 * INT8_ACTIVATIONS_TOLERANCE.absolute(wanted)
