"""What every engine promises about a prompt that is read beside decode steps: that it cannot, or
that all answers are those of one thing after the other."""

from __future__ import annotations

import numpy as np
import pytest

from remora_agent.engine.protocol import Engine, MixEntry, RowStep
from remora_contract.errors import PromptTooLong, RequestInvalid, Unsupported
from tests.agent.engine.conftest import Bench
from tests.agent.engine.portable import Weighted, random_adapter
from tests.agent.engine.test_conformance_rows import PROMPT, close, ids


@pytest.fixture
def overlapping(engine: Engine) -> Engine:
    if not engine.limits.overlaps:
        with pytest.raises(Unsupported, match="beside decode steps"):
            engine.begin_prefill(0, ids(PROMPT), 0)
        with pytest.raises(Unsupported):
            engine.prefill_ready()
        with pytest.raises(Unsupported):
            engine.end_prefill()
        pytest.skip("refused by name")
    return engine


@pytest.mark.parametrize("row", range(4))
def test_a_prompt_beside_steps_answers_as_one_behind_the_other(
    overlapping: Engine, bench: Bench, row: int
):
    others = {r: [20 + r, 9, 8][: r + 1] for r in range(4) if r != row}
    for r, tokens in others.items():
        overlapping.prefill(r, ids(tokens), 0)
    for _ in range(2):  # the second time the rows have decoded before
        for r, tokens in others.items():
            tokens.append(33 + r)
        overlapping.decode([RowStep(r, t[-1], len(t) - 1) for r, t in others.items()])
    overlapping.begin_prefill(row, ids(PROMPT), 0)
    for _ in range(3):
        for r, tokens in others.items():
            tokens.append(60 + r)
        steps = [RowStep(r, t[-1], len(t) - 1) for r, t in others.items()]
        for step, logits in zip(steps, overlapping.decode(steps), strict=True):
            assert close(logits, bench.reference.logits(others[step.row]))
    assert close(overlapping.end_prefill(), bench.reference.logits(PROMPT))
    everyone = {**others, row: list(PROMPT)}
    for tokens in everyone.values():
        tokens.append(5)
    steps = [RowStep(r, t[-1], len(t) - 1) for r, t in everyone.items()]
    for step, logits in zip(steps, overlapping.decode(steps), strict=True):
        assert close(logits, bench.reference.logits(everyone[step.row]))


def test_a_prompt_is_continued_beside_steps_from_what_its_row_holds(
    overlapping: Engine, bench: Bench
):
    overlapping.prefill(1, ids(PROMPT[:3]), 0)
    overlapping.prefill(3, ids([7, 8]), 0)
    overlapping.decode([RowStep(3, 9, 2)])
    overlapping.begin_prefill(1, ids(PROMPT[3:]), 3)  # changes places with row 3, prefix and all
    logits = overlapping.decode([RowStep(3, 10, 3)])[0]
    assert close(logits, bench.reference.logits([7, 8, 9, 10]))
    assert close(overlapping.end_prefill(), bench.reference.logits(PROMPT))


def test_adapters_come_go_and_mix_while_a_prompt_is_read(overlapping: Engine, bench: Bench):
    a, b = random_adapter(bench.spec, 1), random_adapter(bench.spec, 2, rank=9)
    mine = (MixEntry(overlapping.add_adapter(a), 0.7),)
    overlapping.prefill(0, ids([1, 2]), 0)
    overlapping.begin_prefill(2, ids(PROMPT), 0, mine)
    added = overlapping.add_adapter(b)  # another layout of the bank
    logits = overlapping.decode([RowStep(0, 3, 2, (MixEntry(added, 1.0),))])[0]
    handles = overlapping.end_prefill()
    assert close(handles, bench.reference.logits(PROMPT, (Weighted(a, 0.7),)))
    overlapping.begin_prefill(3, ids(PROMPT), 0, (MixEntry(added, 1.0),))
    overlapping.remove_adapter(mine[0].handle)
    assert close(overlapping.end_prefill(), bench.reference.logits(PROMPT, (Weighted(b),)))
    assert np.isfinite(logits).all()


def test_what_cannot_run_beside_it_waits_for_it(overlapping: Engine, bench: Bench):
    overlapping.prefill(0, ids([4, 5]), 0)
    overlapping.begin_prefill(2, ids(PROMPT), 0)
    assert close(overlapping.prefill(1, ids([6, 7]), 0), bench.reference.logits([6, 7]))
    assert overlapping.prefill_ready()
    assert close(overlapping.end_prefill(), bench.reference.logits(PROMPT))
    overlapping.begin_prefill(1, ids(PROMPT), 0)
    block = overlapping.read_kv(2, 0, 4)  # another row's: no reason to wait
    assert overlapping.read_kv(1, 0, 4).tokens == block.tokens
    assert close(overlapping.end_prefill(), bench.reference.logits(PROMPT))


def test_one_prompt_at_a_time_and_none_that_was_not_begun(overlapping: Engine):
    for call in (overlapping.prefill_ready, overlapping.end_prefill):
        with pytest.raises(RequestInvalid, match="no prompt"):
            call()
    overlapping.begin_prefill(0, ids(PROMPT), 0)
    with pytest.raises(RequestInvalid, match="end it first"):
        overlapping.begin_prefill(1, ids(PROMPT), 0)
    overlapping.end_prefill()
    with pytest.raises(RequestInvalid):
        overlapping.begin_prefill(1, ids(PROMPT), 5)  # it holds nothing
    with pytest.raises(PromptTooLong):
        overlapping.begin_prefill(1, ids([1] * 2000), 0)
    with pytest.raises(RequestInvalid, match="no prompt"):
        overlapping.end_prefill()
