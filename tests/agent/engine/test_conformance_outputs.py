"""What every engine promises about logits of many positions and about states.

Agreement is with the portable graph, position by position; of states with the head's products.
"""

from __future__ import annotations

import numpy as np
import pytest

from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_contract.errors import PromptTooLong, RequestInvalid, Unavailable
from tests.agent.engine.conftest import Bench
from tests.agent.engine.portable import Weighted, random_adapter

PROMPT = [3, 4, 5, 6, 7, 80, 11, 12]
CLOSE = 2e-5


def ids(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.int64)


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= CLOSE)


def every(bench: Bench, tokens: list[int], start: int, mix: tuple[Weighted, ...] = ()):
    """Logits [len(tokens) - start, vocab] of the portable graph, one run a position."""
    ends = range(start + 1, len(tokens) + 1)
    return np.stack([bench.reference.logits(tokens[:end], mix) for end in ends])


def test_a_score_gives_the_logits_after_every_token(bench: Bench, engine: Engine):
    logits = engine.score(1, ids(PROMPT), 0)
    assert logits.dtype == np.float32
    assert close(logits, every(bench, PROMPT, 0))


def test_a_score_may_follow_a_prompt(bench: Bench, engine: Engine):
    engine.prefill(2, ids(PROMPT[:3]), 0)
    assert close(engine.score(2, ids(PROMPT[3:]), 3), every(bench, PROMPT, 3))


def test_a_scored_row_goes_on_as_if_it_had_been_prefilled(bench: Bench, engine: Engine):
    engine.score(0, ids(PROMPT), 0)
    logits = engine.decode([RowStep(0, 44, len(PROMPT))])[0]
    assert close(logits, bench.reference.logits([*PROMPT, 44]))


def test_rejected_tokens_leave_nothing_behind(bench: Bench, engine: Engine):
    engine.prefill(0, ids(PROMPT), 0)
    engine.score(0, ids([90, 91, 92, 93]), len(PROMPT))
    logits = engine.decode([RowStep(0, 55, len(PROMPT) + 1)])[0]
    assert close(logits, bench.reference.logits([*PROMPT, 90, 55]))


def test_scores_of_different_lengths_may_follow_each_other(bench: Bench, engine: Engine):
    tokens = list(PROMPT)
    engine.prefill(3, ids(tokens), 0)
    for size in (3, 1, 5, 2, 5):
        chunk = [(17 * size + i) % 160 for i in range(size)]
        start, tokens = len(tokens), [*tokens, *chunk]
        assert close(engine.score(3, ids(chunk), start), every(bench, tokens, start))


def test_scores_are_the_callers_to_keep(engine: Engine):
    first = engine.score(0, ids(PROMPT), 0)
    kept = first.copy()
    engine.score(0, ids(PROMPT[::-1]), 0)
    assert np.array_equal(first, kept)


def test_a_score_goes_through_the_rows_adapters(bench: Bench, engine: Engine):
    a, b = random_adapter(bench.spec, 1, rank=4), random_adapter(bench.spec, 2, rank=7)
    mix = (MixEntry(engine.add_adapter(a), 0.5), MixEntry(engine.add_adapter(b), 1.0))
    wanted = every(bench, PROMPT, 0, (Weighted(a, 0.5), Weighted(b)))
    assert close(engine.score(1, ids(PROMPT), 0, mix), wanted)


def test_a_score_leaves_other_rows_alone(bench: Bench, engine: Engine):
    engine.prefill(0, ids(PROMPT), 0)
    engine.score(1, ids([9, 8, 7, 6]), 0)
    logits = engine.decode([RowStep(0, 5, len(PROMPT))])[0]
    assert close(logits, bench.reference.logits([*PROMPT, 5]))


def test_states_are_what_the_head_multiplies(bench: Bench, engine: Engine):
    """One linear map takes the states of all positions to their logits."""
    rng = np.random.default_rng(5)
    tokens = [int(t) for t in rng.integers(0, 160, 46)]
    states, logits = engine.embed(0, ids(tokens), 0), engine.score(1, ids(tokens), 0)
    assert states.shape == (46, engine.limits.hidden) == (46, bench.spec.hidden)
    assert states.dtype == np.float32
    more = [int(t) for t in rng.integers(0, 160, 46)]
    states = np.concatenate([states, engine.embed(0, ids(more), 0)])
    logits = np.concatenate([logits, engine.score(1, ids(more), 0)])
    head, _, rank, _ = np.linalg.lstsq(states[:80], logits[:80], rcond=None)
    assert rank == bench.spec.hidden
    assert np.abs(states[80:] @ head - logits[80:]).max() < 2e-3


def test_states_do_not_depend_on_how_the_prompt_is_cut(engine: Engine):
    whole = engine.embed(0, ids(PROMPT), 0)
    parts = [engine.embed(1, ids(PROMPT[a:b]), a) for a, b in ((0, 1), (1, 6), (6, 8))]
    assert close(np.concatenate(parts), whole)


def test_an_embedded_row_goes_on_as_if_it_had_been_prefilled(bench: Bench, engine: Engine):
    engine.embed(0, ids(PROMPT), 0)
    logits = engine.decode([RowStep(0, 44, len(PROMPT))])[0]
    assert close(logits, bench.reference.logits([*PROMPT, 44]))


def test_states_go_through_the_rows_adapters(bench: Bench, engine: Engine):
    mix = (MixEntry(engine.add_adapter(random_adapter(bench.spec, 1)), 1.0),)
    base = engine.embed(0, ids(PROMPT), 0)
    assert np.abs(engine.embed(0, ids(PROMPT), 0, mix) - base).max() > 100 * CLOSE
    assert np.array_equal(engine.embed(0, ids(PROMPT), 0), base)


@pytest.mark.parametrize("call", ["score", "embed"])
def test_an_impossible_chunk_is_refused_by_name(engine: Engine, call: str):
    run = getattr(engine, call)
    with pytest.raises(RequestInvalid, match="at least one token"):
        run(0, ids([]), 0)
    with pytest.raises(RequestInvalid, match="leaves a gap"):
        run(0, ids(PROMPT), 1)
    with pytest.raises(RequestInvalid, match="token ids"):
        run(0, ids([160]), 0)
    with pytest.raises(RequestInvalid, match="row 4"):
        run(4, ids(PROMPT), 0)


def test_states_past_the_context_are_refused(engine: Engine):
    with pytest.raises(PromptTooLong):
        engine.embed(0, ids([1] * (engine.limits.context + 1)), 0)


def test_more_tokens_than_one_score_takes_are_refused(engine: Engine):
    assert engine.limits.scored >= 1
    with pytest.raises((RequestInvalid, PromptTooLong)):
        engine.score(0, ids([1] * (engine.limits.scored + 1)), 0)


def test_a_closed_engine_scores_and_embeds_no_more(bench: Bench):
    engine = bench.open()
    engine.close()
    with pytest.raises(Unavailable):
        engine.score(0, ids(PROMPT), 0)
    with pytest.raises(Unavailable):
        engine.embed(0, ids(PROMPT), 0)
