"""What every engine promises about adapters. Agreement is with the portable graph's bank."""

from __future__ import annotations

import numpy as np
import pytest

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_contract.errors import AdapterInvalid, Exhausted, NotFound
from remora_contract.targets import AdapterTarget
from tests.agent.engine.conftest import Bench
from tests.agent.engine.portable import Weighted, random_adapter
from tests.agent.engine.test_conformance_rows import PROMPT, close, ids


def mix_of(*entries: tuple[int, float]) -> Mix:
    return tuple(MixEntry(handle, weight) for handle, weight in entries)


def answers(engine: Engine, bench: Bench, mix: Mix, weighted: tuple[Weighted, ...]) -> None:
    """Prefill and two steps of row 0 agree with the reference."""
    tokens = list(PROMPT)
    assert close(engine.prefill(0, ids(tokens), 0, mix), bench.reference.logits(tokens, weighted))
    for token in (20, 21):
        logits = engine.decode([RowStep(0, token, len(tokens), mix)])[0]
        tokens.append(token)
        assert close(logits, bench.reference.logits(tokens, weighted))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_adapter_answers_as_the_bank_does(bench: Bench, engine: Engine, dtype: type):
    a = random_adapter(bench.spec, 1, rank=4, dtype=dtype)
    handle = engine.add_adapter(a)
    answers(engine, bench, mix_of((handle, 1.0)), (Weighted(a),))


@pytest.mark.parametrize(
    "projections", [("q", "v"), ("k",), ("o",), ("up",), ("down",), ("gate", "down")]
)
def test_an_adapter_on_some_projections_changes_only_those(
    bench: Bench, engine: Engine, projections: tuple
):
    a = random_adapter(bench.spec, 2, rank=3, projections=projections)
    handle = engine.add_adapter(a)
    answers(engine, bench, mix_of((handle, 1.0)), (Weighted(a),))


def test_a_rank_equal_to_the_projections_dimension_works(bench: Bench, engine: Engine):
    a = random_adapter(bench.spec, 3, rank=bench.spec.hidden)
    handle = engine.add_adapter(a)
    answers(engine, bench, mix_of((handle, 1.0)), (Weighted(a),))


def test_ranks_may_differ_between_projections(bench: Bench, engine: Engine):
    a = random_adapter(bench.spec, 4, rank=2, ranks={"q": 7, "v": 1, "up": 5})
    handle = engine.add_adapter(a)
    answers(engine, bench, mix_of((handle, 1.0)), (Weighted(a),))


def test_ranks_may_differ_between_layers_and_layers_may_lack(bench: Bench, engine: Engine):
    wide, narrow = random_adapter(bench.spec, 5, 8), random_adapter(bench.spec, 6, 2)
    tensors = {t: f for t, f in wide.tensors.items() if t.layer == 0}
    tensors |= {t: f for t, f in narrow.tensors.items() if t.layer == 1 and t.projection != "q"}
    a = AdapterWeights(wide.digest, tensors)
    handle = engine.add_adapter(a)
    answers(engine, bench, mix_of((handle, 1.0)), (Weighted(a),))


@pytest.mark.parametrize("weight", [0.0, 0.5, -1.0, 2.0])
def test_a_weight_scales_the_adapters_part(bench: Bench, engine: Engine, weight: float):
    a = random_adapter(bench.spec, 7)
    handle = engine.add_adapter(a)
    answers(engine, bench, mix_of((handle, weight)), (Weighted(a, weight),))


def test_adapters_of_different_rank_and_targets_compose(bench: Bench, engine: Engine):
    a = random_adapter(bench.spec, 8, rank=4)
    b = random_adapter(bench.spec, 9, rank=6, projections=("q", "v", "down"))
    ha, hb = engine.add_adapter(a), engine.add_adapter(b)
    weighted = (Weighted(a, 0.7), Weighted(b, 0.4))
    answers(engine, bench, mix_of((ha, 0.7), (hb, 0.4)), weighted)


def test_every_row_of_a_mixed_batch_answers_as_alone(bench: Bench, engine: Engine):
    a = random_adapter(bench.spec, 10, rank=4)
    b = random_adapter(bench.spec, 11, rank=9, projections=("q", "k", "up"))
    ha, hb = engine.add_adapter(a), engine.add_adapter(b)
    mixes = {
        0: (mix_of((hb, 1.0)), (Weighted(b),)),
        1: ((), ()),
        2: (mix_of((ha, 1.0)), (Weighted(a),)),
        3: (mix_of((ha, 0.5), (hb, 0.5)), (Weighted(a, 0.5), Weighted(b, 0.5))),
    }
    tokens = {row: PROMPT[: 3 + row] for row in mixes}
    for row, (mix, _) in mixes.items():
        engine.prefill(row, ids(tokens[row]), 0, mix)
    for rows in ((0, 1, 2, 3), (3, 1), (0, 2), (2,), (1, 2, 3, 0)):
        steps = [RowStep(r, 70 + r, len(tokens[r]), mixes[r][0]) for r in rows]
        for step, logits in zip(steps, engine.decode(steps), strict=True):
            tokens[step.row] = [*tokens[step.row], step.token]
            wanted = bench.reference.logits(tokens[step.row], mixes[step.row][1])
            assert close(logits, wanted)


def test_a_row_may_change_its_mix_between_steps(bench: Bench, engine: Engine):
    """A narrow mix in a slot that held a wide one sees nothing of it."""
    wide, narrow = random_adapter(bench.spec, 12, 24), random_adapter(bench.spec, 13, 1)
    hw, hn = engine.add_adapter(wide), engine.add_adapter(narrow)
    for first, second, weights in (
        (mix_of((hw, 1.0)), (), ()),
        (mix_of((hn, 1.0)), mix_of((hw, 1.0)), (Weighted(wide),)),
        (mix_of((hw, 1.0)), mix_of((hn, 1.0)), (Weighted(narrow),)),
    ):
        for row, mix in ((0, first), (1, second)):
            engine.prefill(row, ids([1, 2]), 0, mix)
            engine.prefill(row, ids([1, 2]), 0, mix)
        engine.decode([RowStep(0, 3, 2, second), RowStep(1, 3, 2, first)])
        engine.prefill(0, ids([1, 2]), 0, second)
        steps = [RowStep(0, 3, 2, second), RowStep(1, 3, 2, first)]
        assert close(engine.decode(steps)[0], bench.reference.logits([1, 2, 3], weights))


def test_an_answer_does_not_depend_on_what_else_is_resident(bench: Bench, engine: Engine):
    a = random_adapter(bench.spec, 14)
    ha = engine.add_adapter(a)
    alone = engine.prefill(0, ids(PROMPT), 0, mix_of((ha, 1.0)))
    base = engine.prefill(0, ids(PROMPT), 0)
    loud = random_adapter(bench.spec, 15, rank=32)
    loud = AdapterWeights(
        loud.digest,
        {t: (a * np.float32(1e18), b * np.float32(1e18)) for t, (a, b) in loud.tensors.items()},
    )
    hl = engine.add_adapter(loud)
    engine.prefill(1, ids(PROMPT), 0, mix_of((hl, 1.0)))
    assert np.array_equal(engine.prefill(0, ids(PROMPT), 0, mix_of((ha, 1.0))), alone)
    assert np.array_equal(engine.prefill(0, ids(PROMPT), 0), base)


def test_an_answer_does_not_depend_on_the_other_rows_adapters(bench: Bench, engine: Engine):
    """Even where the neighbour's numbers overflow to infinity and NaN."""
    a = random_adapter(bench.spec, 16)
    loud = random_adapter(bench.spec, 17, rank=5)
    tensors = {
        t: (x * np.float32(1e25), y * np.float32(1e25)) for t, (x, y) in loud.tensors.items()
    }
    ha = engine.add_adapter(a)
    hb = engine.add_adapter(random_adapter(bench.spec, 18, rank=5))
    hl = engine.add_adapter(AdapterWeights(loud.digest, tensors))
    results = []
    for neighbour in (hb, hl):
        for row in (0, 1, 2):
            engine.prefill(row, ids(PROMPT), 0)
        steps = [
            RowStep(0, 9, 8, mix_of((ha, 1.0))),
            RowStep(1, 9, 8, mix_of((neighbour, 1.0))),
            RowStep(2, 9, 8),
        ]
        results.append(engine.decode(steps))
    assert not np.isfinite(results[1][1]).all()
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][2], results[1][2])


def test_swapping_adapters_back_gives_identical_bits(bench: Bench, engine: Engine):
    a, b = random_adapter(bench.spec, 19), random_adapter(bench.spec, 20, rank=8)
    ha = engine.add_adapter(a)
    first = engine.prefill(0, ids(PROMPT), 0, mix_of((ha, 1.0)))
    hb = engine.add_adapter(b)
    engine.prefill(0, ids(PROMPT), 0, mix_of((hb, 1.0)))
    engine.remove_adapter(ha)
    again = engine.add_adapter(a)
    assert again != ha
    assert np.array_equal(engine.prefill(0, ids(PROMPT), 0, mix_of((again, 1.0))), first)


def test_removing_an_adapter_frees_its_rank_and_its_handle(bench: Bench, engine: Engine):
    capacity = engine.limits.max_bank_rank
    half = random_adapter(bench.spec, 21, rank=capacity // 2)
    first = engine.add_adapter(half)
    engine.add_adapter(half)
    with pytest.raises(Exhausted, match=f"holds {capacity} of {capacity}"):
        engine.add_adapter(random_adapter(bench.spec, 22, rank=1))
    engine.remove_adapter(first)
    assert engine.add_adapter(half) != first
    with pytest.raises(NotFound):
        engine.remove_adapter(first)
    with pytest.raises(NotFound):
        engine.prefill(0, ids(PROMPT), 0, mix_of((first, 1.0)))


def test_an_adapter_may_leave_while_others_are_decoding(bench: Bench, engine: Engine):
    a, b = random_adapter(bench.spec, 23), random_adapter(bench.spec, 24)
    ha, hb = engine.add_adapter(a), engine.add_adapter(b)
    for row, handle in ((0, ha), (1, hb)):
        engine.prefill(row, ids(PROMPT), 0, mix_of((handle, 1.0)))
    both = [RowStep(0, 1, 8, mix_of((ha, 1.0))), RowStep(1, 1, 8, mix_of((hb, 1.0)))]
    engine.decode(both)
    engine.remove_adapter(hb)
    engine.prefill(1, ids(PROMPT), 0)
    logits = engine.decode([RowStep(0, 2, 9, mix_of((ha, 1.0))), RowStep(1, 5, 8)])
    assert close(logits[0], bench.reference.logits([*PROMPT, 1, 2], (Weighted(a),)))
    assert close(logits[1], bench.reference.logits([*PROMPT, 5]))


def test_an_adapter_of_another_shape_is_refused_by_its_targets_name(bench: Bench, engine: Engine):
    good = random_adapter(bench.spec, 25)
    a, b = good.tensors[AdapterTarget(1, "down")]
    for target, factors in (
        (AdapterTarget(9, "q"), (a, b)),
        (AdapterTarget(1, "down"), (a.T.copy(), b)),
        (AdapterTarget(1, "down"), (a, b[:, :-1])),
        (AdapterTarget(1, "down"), (a[:, :2], b)),
    ):
        wrong = AdapterWeights(good.digest, {**good.tensors, target: factors})
        with pytest.raises(AdapterInvalid, match=target.name().replace(".", r"\.")):
            engine.add_adapter(wrong)
    engine.add_adapter(good)


def test_a_bundle_without_a_bank_takes_no_adapter_and_answers(bankless: Engine):
    assert np.isfinite(bankless.prefill(0, ids(PROMPT), 0)).all()
    with pytest.raises(Exhausted, match="max-bank-rank"):
        bankless.add_adapter(random_adapter(_spec(), 26))


def _spec():
    from tests.agent.engine.portable import QWEN2

    return QWEN2
