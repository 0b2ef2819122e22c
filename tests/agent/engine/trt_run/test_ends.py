"""Adapters on embedding and head: as the portable graph answers, in mixed rows, scored too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_contract.bank_inputs import places
from remora_contract.bundle import Bundle, load_bundle
from remora_contract.digests import digest_bytes
from remora_contract.targets import (
    PARTS,
    PROJECTIONS,
    AdapterTarget,
    lora_a,
    lora_b,
    lora_gate,
)
from remora_contract.trt_memory import TrtSizes
from tests.agent.engine.portable import FLOAT32, LLAMA, random_bundle
from tests.support.adapters import Tensors, random_tensors
from tests.support.portable import PortableModel
from tests.support.trt_engines import CHUNK, Bench, build

SPEC = LLAMA  # its head is its own
GRAPH = replace(FLOAT32, adapt=("embed", "head"), max_bank_rank=24)
TOKENS = np.random.default_rng(3).integers(0, SPEC.vocab, 20)
PROMPT = 12
CLOSE = 2e-5


def tensors(seed: int, r: int) -> Tensors:
    return random_tensors(SPEC, seed=seed, r=r, projections=PROJECTIONS) | random_tensors(
        SPEC, seed=seed + 50, r=r, projections=("embed", "head"), layers=[0], scale=0.5
    )


ADAPTERS = (tensors(1, 3), tensors(2, 9))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = random_bundle(tmp_path_factory.mktemp("ends") / "bundle", SPEC, GRAPH)
    return Bench(directory, build(directory, directory.parent / "engine"))


@pytest.fixture
def engine(bench: Bench):
    engine = bench.open()
    yield engine
    engine.close()


def handle(engine: Engine, adapter: Tensors) -> int:
    digest = digest_bytes(str(len(adapter)).encode())
    return engine.add_adapter(AdapterWeights(digest, dict(adapter)))


def wanted(bundle_dir: Path, used: list[tuple[Tensors, float]]) -> np.ndarray:
    """Teacher-forced logits [steps + 1, vocab] of the portable graph."""
    portable = PortableModel(bundle_dir, rows=1)
    portable.adapter_feed = feed(portable.bundle, used)
    return portable.forced(TOKENS[None], PROMPT)[0]


def feed(bundle: Bundle, used: list[tuple[Tensors, float]]) -> dict[str, np.ndarray]:
    """One adapter after the other in every group, of one row."""
    found: dict[str, np.ndarray] = {}
    for layer, group in places(bundle.decoder, bundle.graph):
        parts = PARTS[group]
        outputs = [SPEC.out_features(p) for p in parts]
        a, b, gate = [], [], []
        for adapter, weight in used:
            for i, part in enumerate(parts):
                own_a, own_b = adapter[AdapterTarget(layer, part)]
                wide = np.zeros((own_b.shape[0], sum(outputs)), np.float32)
                begin = sum(outputs[:i])
                wide[:, begin : begin + outputs[i]] = own_b
                a, b = [*a, own_a], [*b, wide]
                gate += [weight] * own_b.shape[0]
        k, n = SPEC.in_features(parts[0]), sum(outputs)
        found[lora_a(layer, group)] = np.hstack([np.zeros((k, 0), np.float32), *a])
        found[lora_b(layer, group)] = np.vstack([np.zeros((0, n), np.float32), *b])
        found[lora_gate(group)] = np.array(gate, np.float32)[None, None]
    return found


def test_rows_with_different_mixes_answer_as_the_portable_graph(bench: Bench, engine: Engine):
    one, two = (handle(engine, a) for a in ADAPTERS)
    cases = (
        ((), []),
        ((MixEntry(one, 1.0),), [(ADAPTERS[0], 1.0)]),
        ((MixEntry(one, 0.4), MixEntry(two, 0.7)), [(ADAPTERS[0], 0.4), (ADAPTERS[1], 0.7)]),
    )
    have = [[engine.prefill(r, TOKENS[:PROMPT], 0, mix) for r, (mix, _) in enumerate(cases)]]
    for at in range(PROMPT, len(TOKENS)):
        steps = [RowStep(r, int(TOKENS[at]), at, mix) for r, (mix, _) in enumerate(cases)]
        have.append(list(engine.decode(steps)))
    for row, (_, used) in enumerate(cases):
        found = np.stack([step[row] for step in have])
        assert np.abs(found - wanted(bench.bundle_dir, used)).max() <= CLOSE
    assert np.abs(have[0][0] - have[0][1]).max() > 100 * CLOSE


def test_many_positions_are_scored_through_an_adapted_head(bench: Bench, engine: Engine):
    mix = (MixEntry(handle(engine, ADAPTERS[1]), 0.7),)
    engine.prefill(2, TOKENS[:PROMPT], 0, mix)
    scored = engine.score(2, TOKENS[PROMPT:], PROMPT, mix)
    assert np.abs(scored - wanted(bench.bundle_dir, [(ADAPTERS[1], 0.7)])[1:]).max() <= CLOSE


def test_a_removed_adapter_leaves_the_ends_as_they_were(engine: Engine):
    before = engine.prefill(0, TOKENS, 0)
    gone = handle(engine, ADAPTERS[0])
    kept = handle(engine, ADAPTERS[1])
    mix = (MixEntry(kept, 1.0),)
    with_kept = engine.prefill(1, TOKENS, 0, mix)
    engine.remove_adapter(gone)
    assert np.array_equal(engine.prefill(0, TOKENS, 0), before)
    assert np.abs(engine.prefill(1, TOKENS, 0, mix) - with_kept).max() <= CLOSE


def test_their_room_is_in_the_memory_plan(bench: Bench):
    sizes = TrtSizes.of(load_bundle(bench.bundle_dir))
    engine = bench.open(rows=3)
    plan = sizes.memory_plan(3, weights=0, workspace=0, chunk=CHUNK)
    assert 0 <= bench.cuda.used - (plan.total - plan.floor) <= 64 << 10
    engine.close()
