"""What every engine promises about the rest of the bank: DoRA's factors, biases, experts' factors.
Agreement is with the portable graph's inputs of docs/graph.md."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from remora_agent.bank.weights import AdapterWeights, Vectors
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_contract.errors import AdapterInvalid, RequestInvalid
from remora_contract.targets import ALL_PROJECTIONS, EXPERT_GROUPS, PARTS, AdapterTarget
from tests.agent.engine.conftest import BANK_CASES, GPU_BANK_CASES, Bench, Case
from tests.agent.engine.portable import Weighted, random_adapter, with_vectors
from tests.agent.engine.test_conformance_adapters import answers, mix_of
from tests.agent.engine.test_conformance_rows import PROMPT, close, ids

EXPERTS = tuple(p for group in EXPERT_GROUPS for p in PARTS[group])
Used = tuple[Weighted, ...]


ALL = [*BANK_CASES, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BANK_CASES)]


@pytest.fixture(params=ALL, scope="session")
def bench(request: pytest.FixtureRequest, make_bench: Callable[[Case], Bench]) -> Bench:
    return make_bench((BANK_CASES | GPU_BANK_CASES)[request.param])


of_experts = pytest.mark.parametrize(
    "bench",
    [
        *(name for name in BANK_CASES if "experts" in name),
        *(pytest.param(n, marks=pytest.mark.gpu) for n in GPU_BANK_CASES if "experts" in n),
    ],
    indirect=True,
    scope="session",
)


def plain(bench: Bench, seed: int, rank: int = 4) -> AdapterWeights:
    """On every projection there is, experts' too."""
    inside = tuple(p for p in ALL_PROJECTIONS if p not in ("embed", "head"))
    return random_adapter(bench.spec, seed, rank, projections=inside)


def dora(bench: Bench, seed: int, rank: int = 3, bias: bool = False) -> AdapterWeights:
    return with_vectors(plain(bench, seed, rank), bench.spec, seed, dora=True, bias=bias)


def biased(bench: Bench, seed: int, rank: int = 3) -> AdapterWeights:
    return with_vectors(plain(bench, seed, rank), bench.spec, seed, bias=True)


def whole(engine: Engine, weights: AdapterWeights) -> tuple[Mix, Used]:
    return mix_of((engine.add_adapter(weights), 1.0)), (Weighted(weights),)


@pytest.mark.parametrize("bias", [False, True])
def test_a_dora_adapter_answers_as_the_graph_does(bench: Bench, engine: Engine, bias: bool):
    answers(engine, bench, *whole(engine, dora(bench, 1, bias=bias)))


def test_vectors_may_stand_around_some_projections(bench: Bench, engine: Engine):
    own = with_vectors(
        plain(bench, 2), bench.spec, 2, dora=True, bias=True, projections=("v", "o", "up")
    )
    answers(engine, bench, *whole(engine, own))


def test_biases_alone_are_an_adapter(bench: Bench, engine: Engine):
    own = with_vectors(AdapterWeights(plain(bench, 3).digest, {}), bench.spec, 3, bias=True)
    answers(engine, bench, *whole(engine, own))


@pytest.mark.parametrize("weight", [0.0, 0.5, -1.0])
def test_a_weight_scales_biases_as_it_does_factors(bench: Bench, engine: Engine, weight: float):
    own = biased(bench, 4)
    handle = engine.add_adapter(own)
    answers(engine, bench, mix_of((handle, weight)), (Weighted(own, weight),))


def test_biases_of_composed_adapters_are_summed(bench: Bench, engine: Engine):
    a, b, c = biased(bench, 5), plain(bench, 6, rank=7), biased(bench, 7, rank=2)
    handles = [engine.add_adapter(x) for x in (a, b, c)]
    weights = (0.7, 0.4, -1.2)
    used = tuple(Weighted(x, w) for x, w in zip((a, b, c), weights, strict=True))
    answers(engine, bench, mix_of(*zip(handles, weights, strict=True)), used)


def test_every_row_of_a_mixed_batch_answers_as_alone(bench: Bench, engine: Engine):
    one, two = whole(engine, dora(bench, 8, bias=True)), whole(engine, biased(bench, 9))
    three = whole(engine, plain(bench, 10, rank=9))
    mixes = {0: three, 1: ((), ()), 2: one, 3: two}
    tokens = {row: PROMPT[: 3 + row] for row in mixes}
    for row, (mix, _) in mixes.items():
        engine.prefill(row, ids(tokens[row]), 0, mix)
    for rows in ((0, 1, 2, 3), (3, 1), (0, 2), (2,), (1, 2, 3, 0)):
        steps = [RowStep(r, 70 + r, len(tokens[r]), mixes[r][0]) for r in rows]
        for step, logits in zip(steps, engine.decode(steps), strict=True):
            tokens[step.row] = [*tokens[step.row], step.token]
            assert close(logits, bench.reference.logits(tokens[step.row], mixes[step.row][1]))


def test_a_row_may_change_its_mix_between_calls(bench: Bench, engine: Engine):
    """Nothing of the last mix stays around the next one's outputs."""
    kinds = [
        whole(engine, dora(bench, 11)),
        ((), ()),
        whole(engine, biased(bench, 12)),
        whole(engine, plain(bench, 13)),
        whole(engine, dora(bench, 14, bias=True)),
    ]
    for mix, used in [*kinds, *reversed(kinds)]:
        answers(engine, bench, mix, used)


def test_adapters_may_be_swapped_while_another_row_decodes(bench: Bench, engine: Engine):
    """Of ranks that need more columns than there were, and again fewer."""
    mix, used = whole(engine, dora(bench, 15, bias=True))
    tokens = list(PROMPT)
    engine.prefill(1, ids(tokens), 0, mix)
    for i, rank in enumerate((2, 20, 5, 40)):
        make = (plain, biased, dora, plain)[i]
        other = make(bench, 30 + i, rank)
        handle = engine.add_adapter(other)
        engine.prefill(0, ids(PROMPT), 0, mix_of((handle, 1.0)))
        steps = [RowStep(0, 9, 8, mix_of((handle, 1.0))), RowStep(1, 50 + i, len(tokens), mix)]
        logits = engine.decode(steps)
        tokens.append(50 + i)
        assert close(logits[0], bench.reference.logits([*PROMPT, 9], (Weighted(other),)))
        assert close(logits[1], bench.reference.logits(tokens, used))
        engine.remove_adapter(handle)


def test_a_removed_adapter_leaves_no_trace(bench: Bench, engine: Engine):
    kept, _ = whole(engine, plain(bench, 16))
    before = [engine.prefill(0, ids(PROMPT), 0, mix) for mix in ((), kept)]
    own = dora(bench, 17, bias=True)
    gone, _ = whole(engine, own)
    for row in range(4):
        engine.prefill(row, ids(PROMPT), 0, gone)
    engine.decode([RowStep(row, 9, 8, gone) for row in range(4)])
    engine.remove_adapter(gone[0].handle)
    after = [engine.prefill(0, ids(PROMPT), 0, mix) for mix in ((), kept)]
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))
    answers(engine, bench, *whole(engine, own))


def test_an_answer_does_not_depend_on_the_other_rows_vectors(bench: Bench, engine: Engine):
    """Even where the neighbour's numbers overflow to infinity and NaN."""
    own, quiet = (whole(engine, dora(bench, seed, bias=True))[0] for seed in (18, 19))
    loud = dora(bench, 20, bias=True)
    vectors = {
        t: Vectors(v.scale * np.float32(1e30), v.bias * np.float32(1e30))
        for t, v in loud.vectors.items()
    }
    screaming, _ = whole(engine, AdapterWeights(loud.digest, loud.tensors, vectors))
    results = []
    for neighbour in (quiet, screaming):
        for row in (0, 1, 2):
            engine.prefill(row, ids(PROMPT), 0)
        steps = [RowStep(0, 9, 8, own), RowStep(1, 9, 8, neighbour), RowStep(2, 9, 8)]
        results.append(engine.decode(steps))
    assert not np.isfinite(results[1][1]).all()
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][2], results[1][2])


def test_a_dora_adapter_in_a_mix_or_weighted_is_refused(bench: Bench, engine: Engine):
    (entry,), _ = whole(engine, dora(bench, 21))
    (other,), _ = whole(engine, plain(bench, 22))
    for mix in ((MixEntry(entry.handle, 0.5),), (entry, other)):
        with pytest.raises(RequestInvalid, match="DoRA adapter: it answers alone"):
            engine.prefill(0, ids(PROMPT), 0, mix)
        with pytest.raises(RequestInvalid, match="DoRA adapter: it answers alone"):
            engine.decode([RowStep(0, 1, 0, mix)])
    answers(engine, bench, (), ())


def test_vectors_of_another_shape_are_refused_by_their_targets_name(bench: Bench, engine: Engine):
    good = plain(bench, 23)
    for target, vectors in (
        (AdapterTarget(1, "o"), Vectors(scale=np.ones(63, np.float32))),
        (AdapterTarget(0, "q"), Vectors(bias=np.ones((1, 64), np.float32))),
    ):
        wrong = AdapterWeights(good.digest, good.tensors, {target: vectors})
        with pytest.raises(AdapterInvalid, match=target.name().replace(".", r"\.")):
            engine.add_adapter(wrong)


@of_experts
@pytest.mark.parametrize("projections", [EXPERTS, ("expert_up",), ("expert_down",), EXPERTS[::2]])
def test_an_adapter_on_experts_answers_as_the_graph_does(
    bench: Bench, engine: Engine, projections: tuple
):
    own = random_adapter(bench.spec, 24, rank=3, projections=projections, ranks={"expert_down": 5})
    assert own.tensors
    answers(engine, bench, *whole(engine, own))


@of_experts
def test_adapters_on_experts_compose_and_keep_apart(bench: Bench, engine: Engine):
    """The first is laid out for few columns, then moves as others come and go."""
    kinds = [
        random_adapter(bench.spec, seed, rank, projections=EXPERTS)
        for seed, rank in ((25, 2), (26, 6), (27, 20))
    ]
    handles = []
    for i, kind in enumerate(kinds):
        handles.append(engine.add_adapter(kind))
        weights = [0.5 + j for j in range(i + 1)]
        mix = mix_of(*zip(handles, weights, strict=True))
        used = tuple(Weighted(k, w) for k, w in zip(kinds[: i + 1], weights, strict=True))
        answers(engine, bench, mix, used)
    engine.remove_adapter(handles[1])
    small = random_adapter(bench.spec, 28, 4, projections=("expert_gate", "expert_down"))
    answers(engine, bench, *whole(engine, small))
    mix = mix_of((handles[0], 1.0), (handles[2], -1.0))
    answers(engine, bench, mix, (Weighted(kinds[0]), Weighted(kinds[2], -1.0)))


@of_experts
def test_an_adapter_of_fewer_experts_is_refused_by_its_targets_name(bench: Bench, engine: Engine):
    good = random_adapter(bench.spec, 29, projections=EXPERTS)
    target = AdapterTarget(1, "expert_up")
    a, b = good.tensors[target]
    for factors in ((a[:-1], b[:-1]), (a[0], b[0])):
        wrong = AdapterWeights(good.digest, {**good.tensors, target: factors})
        with pytest.raises(AdapterInvalid, match=r"layers\.1\.expert_up"):
            engine.add_adapter(wrong)
