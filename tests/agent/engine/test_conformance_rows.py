"""What every engine promises about rows and their cache. Agreement is with the portable graph."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.engine.ort import engine as ort_engine
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_contract.errors import PromptTooLong, RequestInvalid, Unavailable
from tests.agent.engine.conftest import Bench
from tests.agent.engine.portable import Weighted, random_adapter

PROMPT = [3, 4, 5, 6, 7, 80, 11, 12]
CLOSE = 2e-5


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int64)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= CLOSE)


def test_prefill_answers_as_the_portable_graph(bench: Bench, engine: Engine):
    assert close(engine.prefill(0, ids(PROMPT), 0), bench.reference.logits(PROMPT))


def test_decode_answers_as_the_portable_graph_token_by_token(bench: Bench, engine: Engine):
    engine.prefill(2, ids(PROMPT), 0)
    tokens = list(PROMPT)
    for token in range(20, 30):
        logits = engine.decode([RowStep(2, token, len(tokens))])
        tokens.append(token)
        assert logits.shape == (1, bench.spec.vocab) and logits.dtype == np.float32
        assert close(logits[0], bench.reference.logits(tokens))


@pytest.mark.parametrize("sizes", [(1, 7), (3, 5), (4, 3, 1), (1,) * 8])
def test_a_prompt_in_chunks_gives_the_whole_prompts_answer(
    engine: Engine, bench: Bench, sizes: tuple[int, ...]
):
    start = 0
    for size in sizes:
        logits = engine.prefill(1, ids(PROMPT[start : start + size]), start)
        start += size
    assert close(logits, bench.reference.logits(PROMPT))


def test_a_prompt_longer_than_one_internal_chunk_is_read_whole(
    engine: Engine, bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ort_engine, "_PREFILL_CHUNK", 3)
    assert close(engine.prefill(0, ids(PROMPT), 0), bench.reference.logits(PROMPT))


def test_rows_decode_together_as_they_would_alone(engine: Engine, bench: Bench):
    prompts = {0: PROMPT, 1: [9, 8], 2: [1, 2, 3, 4, 5], 3: [77]}
    for row, prompt in prompts.items():
        engine.prefill(row, ids(prompt), 0)
    steps = [RowStep(row, 40 + row, len(prompts[row])) for row in (2, 0, 3, 1)]
    for step, logits in zip(steps, engine.decode(steps), strict=True):
        assert close(logits, bench.reference.logits([*prompts[step.row], step.token]))


@pytest.mark.parametrize("active", [(0, 3), (1,), (0, 2), (1, 2), (3, 1)])
def test_rows_that_are_not_named_keep_their_cache(
    engine: Engine, bench: Bench, active: tuple[int, ...]
):
    tokens = {row: [*PROMPT[: row + 2], 30 + row] for row in range(4)}
    for row in range(4):
        engine.prefill(row, ids(tokens[row]), 0)
    for token in (50, 51, 52):
        engine.decode([RowStep(row, token, len(tokens[row])) for row in active])
        for row in active:
            tokens[row].append(token)
    logits = engine.decode([RowStep(row, 60, len(tokens[row])) for row in range(4)])
    for row in range(4):
        assert close(logits[row], bench.reference.logits([*tokens[row], 60]))


def test_a_full_row_between_two_active_ones_keeps_its_last_token(engine: Engine, bench: Bench):
    context = engine.limits.context
    full = [(7 * i) % bench.spec.vocab for i in range(context)]
    before = engine.prefill(1, ids(full), 0)
    for row in (0, 2):
        engine.prefill(row, ids(PROMPT), 0)
    engine.decode([RowStep(0, 5, len(PROMPT)), RowStep(2, 6, len(PROMPT))])
    again = engine.decode([RowStep(1, full[-1], context - 1)])[0]
    assert close(again, before)


def test_a_row_may_be_taken_back_to_an_earlier_position(engine: Engine, bench: Bench):
    engine.prefill(0, ids(PROMPT), 0)
    shared = PROMPT[:4]
    logits = engine.prefill(0, ids([90, 91]), 4)
    assert close(logits, bench.reference.logits([*shared, 90, 91]))
    logits = engine.decode([RowStep(0, 92, 5)])[0]
    assert close(logits, bench.reference.logits([*shared, 90, 92]))


def test_a_new_prompt_in_a_used_row_sees_nothing_of_the_old_one(engine: Engine, bench: Bench):
    engine.prefill(0, ids(list(range(40))), 0)
    assert close(engine.prefill(0, ids([5, 6]), 0), bench.reference.logits([5, 6]))


def test_logits_are_the_callers_to_keep(engine: Engine):
    first = engine.prefill(0, ids(PROMPT), 0)
    kept = first.copy()
    step = engine.decode([RowStep(0, 1, len(PROMPT))])
    kept_step = step.copy()
    engine.prefill(0, ids([9, 9, 9]), 0)
    engine.decode([RowStep(0, 2, 3)])
    assert np.array_equal(first, kept) and np.array_equal(step, kept_step)


def test_the_context_can_be_filled_to_its_last_token(engine: Engine, bench: Bench):
    context = engine.limits.context
    tokens = [i % 100 for i in range(context)]
    engine.prefill(0, ids(tokens[:-1]), 0)
    logits = engine.decode([RowStep(0, tokens[-1], context - 1)])[0]
    assert close(logits, bench.reference.logits(tokens))


def test_a_smaller_context_than_the_bundles_is_kept(bench: Bench):
    engine = bench.open(context=8)
    assert engine.limits.context == 8
    assert close(engine.prefill(0, ids(PROMPT), 0), bench.reference.logits(PROMPT))
    with pytest.raises(PromptTooLong, match="context of 8"):
        engine.decode([RowStep(0, 1, 8)])
    engine.close()


def test_a_larger_context_than_the_bundles_is_refused(bench: Bench):
    with pytest.raises(RequestInvalid, match="max-context"):
        bench.open(context=bench.case.graph.context + 1)


def test_a_prompt_past_the_context_is_refused_and_the_row_unchanged(engine: Engine, bench: Bench):
    engine.prefill(0, ids(PROMPT), 0)
    with pytest.raises(PromptTooLong):
        engine.prefill(0, ids([1] * engine.limits.context), len(PROMPT))
    logits = engine.decode([RowStep(0, 5, len(PROMPT))])[0]
    assert close(logits, bench.reference.logits([*PROMPT, 5]))


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([RowStep(4, 1, 0)], "row 4"),
        ([RowStep(-1, 1, 0)], "row -1"),
        ([RowStep(0, 1, 9)], "leaves a gap"),
        ([RowStep(0, 1, 8), RowStep(0, 2, 8)], "twice"),
        ([RowStep(0, 160, 8)], "token ids"),
        ([RowStep(0, -1, 8)], "token ids"),
    ],
)
def test_an_impossible_step_is_refused_by_name(engine: Engine, steps: list[RowStep], words: str):
    engine.prefill(0, ids(PROMPT), 0)
    with pytest.raises(RequestInvalid, match=words):
        engine.decode(steps)


def test_an_empty_prompt_is_refused_and_no_steps_give_no_logits(engine: Engine):
    with pytest.raises(RequestInvalid):
        engine.prefill(0, ids([]), 0)
    assert engine.decode([]).shape == (0, engine.limits.vocab)


def test_a_gap_before_a_prompt_is_refused(engine: Engine):
    with pytest.raises(RequestInvalid, match="leaves a gap"):
        engine.prefill(0, ids(PROMPT), 1)


def test_a_closed_engine_is_unavailable(bench: Bench):
    engine = bench.open()
    engine.close()
    engine.close()
    with pytest.raises(Unavailable):
        engine.prefill(0, ids(PROMPT), 0)
    with pytest.raises(Unavailable):
        engine.decode([RowStep(0, 1, 0)])


def test_two_engines_of_one_build_have_one_digest(bench: Bench):
    a, b = bench.open(), bench.open(context=8)
    assert a.digest == b.digest and a.digest.startswith("sha256:")
    assert a.backend == bench.case.backend
    a.close()
    b.close()


STEP = st.tuples(
    st.sampled_from(["prefill", "decode", "decode", "decode"]),
    st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True),
    st.integers(0, 159),
    st.integers(1, 5),
    st.integers(0, 3),
)


@settings(max_examples=20, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=12))
def test_any_order_of_prefills_and_decodes_answers_as_each_row_alone(bench: Bench, steps):
    """Rows, chunks, mixes and going back, in any order; every answer is checked."""
    engine = bench.open()
    pair = (random_adapter(bench.spec, 1), random_adapter(bench.spec, 2, rank=7))
    handles = [engine.add_adapter(a) for a in pair]
    choices = ((), (0,), (1,), (0, 1))
    tokens: dict[int, list[int]] = {row: [] for row in range(4)}
    mixes: dict[int, tuple[int, ...]] = dict.fromkeys(range(4), ())

    def mix(row: int) -> Mix:
        return tuple(MixEntry(handles[i], 1.0) for i in mixes[row])

    def wanted(row: int) -> np.ndarray:
        return bench.reference.logits(tokens[row], tuple(Weighted(pair[i]) for i in mixes[row]))

    for kind, rows, token, size, choice in steps:
        if kind == "prefill" or not tokens[rows[0]]:
            row = rows[0]
            # A new prompt of its own mix, or more of the row's.
            if choice:
                tokens[row], mixes[row] = [], choices[choice]
            at, chunk = len(tokens[row]), [(token + i) % 160 for i in range(size)]
            tokens[row] += chunk
            if len(tokens[row]) <= engine.limits.context:
                assert close(engine.prefill(row, ids(chunk), at, mix(row)), wanted(row))
            continue
        active = [r for r in rows if 0 < len(tokens[r]) < engine.limits.context]
        asked = [RowStep(r, token, len(tokens[r]), mix(r)) for r in active]
        logits = engine.decode(asked)
        for i, row in enumerate(active):
            tokens[row].append(token)
            assert close(logits[i], wanted(row))
    engine.close()
