"""Models that turn long sequences otherwise: each sequence is of one kind at any time, by all its
tokens, however its prompt is cut and whatever runs beside it. The engine of these tests refuses a
row that holds both kinds, and `solo` reads the whole text again for every token.
"""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remora_agent.engine.golden import Asked, ask, surprise
from remora_agent.runtime.api import PromptScored, Scoring
from remora_agent.runtime.embedding import Embedded, Pooling
from remora_agent.runtime.jobs import Job, SchedulerLimits
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.prefix_keys import BLOCK
from remora_agent.runtime.scheduler import Scheduler
from remora_agent.runtime.work import DecodeStep, PrefillChunk
from remora_contract.errors import InternalFault
from remora_contract.gates import GoldenQuestion
from tests.agent.runtime.test_embedding import embed
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import request

SWITCH, CONTEXT = 2 * BLOCK + 6, 160
ANY = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
around = st.integers(SWITCH - 8, SWITCH + 4)


def prompt_of(count: int, first: int = 0) -> tuple[int, ...]:
    return tuple((first + 7 * i) % 200 for i in range(count))


@given(st.lists(around, min_size=1, max_size=3), st.integers(1, SWITCH + 8), st.booleans())
@ANY
def test_prompts_around_the_switch_answer_as_alone_in_chunks_of_any_size(
    serve, lengths, chunk, drafts
):
    options = RuntimeOptions(prefill_chunk=chunk, draft_tokens=8 if drafts else 0)
    s = serve({"a": 4}, context=CONTEXT, switch=SWITCH, options=options)
    asked = [
        request(str(i), prompt_of(n, i), 20, {"a": 0.5} if i % 2 else None)
        for i, n in enumerate(lengths)
    ]
    heard = [s.submit(r) for r in asked]
    for r, h in zip(asked, heard, strict=True):
        assert h.wait().tokens == s.solo(r)


@given(st.lists(around, min_size=2, max_size=5), st.integers(1, 3))
@ANY
def test_a_prefix_of_one_kind_never_serves_the_other(serve, lengths, rows):
    """All prompts begin alike: what is shared is only of the same kind."""
    options = RuntimeOptions(prefix_bytes=64 * BLOCK * 24 * 8)
    s = serve(rows=rows, context=CONTEXT, switch=SWITCH, options=options)
    for i, n in enumerate(lengths):
        r = request(str(i), prompt_of(n), 16)
        assert s.submit(r).wait().tokens == s.solo(r)


def test_prefixes_are_shared_on_either_side_of_the_switch(serve):
    s = serve(context=CONTEXT, switch=SWITCH)

    def cached(name: str, count: int) -> int:
        return s.submit(request(name, prompt_of(count), 2)).wait().finished.usage.cached_tokens

    assert cached("short", SWITCH - 3) == 0
    assert cached("short again", SWITCH - 3) == 2 * BLOCK
    assert cached("long", SWITCH + 9) == 0
    assert cached("long again", SWITCH + 9) == 2 * BLOCK


def test_what_was_read_again_is_there_for_the_conversations_next_turn(serve):
    s = serve(rows=1, context=CONTEXT, switch=SWITCH)
    first = request("one", prompt_of(SWITCH - 4), 40)
    answer = s.submit(first).wait()
    assert answer.tokens == s.solo(first)
    text = (*first.prompt, *answer.tokens, 5)
    second = request("two", text, 4)
    heard = s.submit(second).wait()
    assert heard.tokens == s.solo(second)
    assert (
        heard.finished.usage.cached_tokens == len(text) // BLOCK * BLOCK > SWITCH // BLOCK * BLOCK
    )


def test_a_row_that_is_read_again_lets_others_answer_between_its_chunks(serve):
    s = serve(rows=2, context=CONTEXT, switch=SWITCH, options=RuntimeOptions(prefill_chunk=8))
    grows, other = request("grows", prompt_of(SWITCH), 10), request("other", (1, 2, 3), 40)
    heard = [s.submit(r) for r in (other, grows)]
    assert [h.wait().tokens for h in heard] == [s.solo(other), s.solo(grows)]
    again = [n for _, start, n in s.engine.calls.prefills if n <= 8]
    assert sum(again) == 3 + SWITCH + SWITCH + 1


@pytest.mark.parametrize("top", [0, 2])
def test_the_prompt_is_scored_once_as_it_was_first_read(serve, top):
    s = serve(context=CONTEXT, switch=SWITCH)
    plain = serve(context=CONTEXT, switch=None)
    asked = replace(request("r", prompt_of(SWITCH - 1), 8), scoring=Scoring(prompt_top=top))
    crossing, never = s.submit(asked).wait(), plain.submit(asked).wait()
    assert crossing.tokens == s.solo(asked)
    scored = [[e for e in h.events if isinstance(e, PromptScored)] for h in (crossing, never)]
    assert scored[0] == scored[1] and len(scored[0]) == 1


@pytest.mark.parametrize("count", [SWITCH, SWITCH + 1])
def test_an_embedding_is_turned_as_one_whole(serve, count):
    vectors = []
    for chunk in (8, CONTEXT):
        s = serve(context=CONTEXT, switch=SWITCH, options=RuntimeOptions(prefill_chunk=chunk))
        found = embed(s, (prompt_of(count),), pooling=Pooling.MEAN).wait()
        assert isinstance(found, Embedded)
        vectors.append(found.vectors)
    assert np.array_equal(*vectors)


LIMITS = SchedulerLimits(rows=1, max_waiting=4, max_waiting_tokens=40, prefill_chunk=4)


def test_reading_again_covers_prompt_and_answer_and_counts_for_the_client():
    scheduler = Scheduler(LIMITS)
    scheduler.submit(Job("r", 5, max_new=6), 0.0)
    scheduler.admit("r", 0.0)
    with pytest.raises(InternalFault):
        scheduler.read_again("r")
    while not isinstance(work := scheduler.next_work(), DecodeStep):
        scheduler.done(work)
    scheduler.done(work)
    scheduler.read_again("r")
    seen = []
    while isinstance(work := scheduler.next_work(), PrefillChunk):
        seen.append((work.start, work.stop, work.last, work.again))
        scheduler.done(work)
    assert seen == [(0, 4, False, True), (4, 7, True, True)]
    assert isinstance(scheduler.next_work(), DecodeStep)


@given(st.integers(3, 9), st.integers(1, 8))
@ANY
def test_golden_questions_are_answered_as_requests_are(length, count):
    """Greedy ones with the row read again, recorded logits in one pass over the whole."""
    engine = ReferenceEngine(rows=1, context=20, vocab=256, switch=6, scored=17)
    prompt = prompt_of(length, 3)
    side = Asked(engine, lambda text: (), lambda tokens: "", frozenset(), lambda name: ())
    answer = engine.solo(prompt, count)
    ask(side, GoldenQuestion("greedy", "exact", tokens=prompt, expected_tokens=answer))
    text = (*prompt, *answer)
    logits = engine.score(0, np.array(text), 0)[-count:]
    question = GoldenQuestion(
        "logits",
        "logits",
        tokens=text,
        expected_tokens=tuple(logits.argmax(-1).tolist()),
        logits=tuple(logits.max(-1).tolist()),
        tolerance=1e-6,
    )
    ask(side, question)


@given(st.integers(2, 18), st.integers(1, 17))
@ANY
def test_a_texts_likelihood_is_of_one_pass_however_it_is_scored(length, scored):
    question = GoldenQuestion("likely", "perplexity", tokens=prompt_of(length, 3))
    nats = []
    for most in (scored, 17, 0):
        engine = ReferenceEngine(rows=1, context=20, vocab=256, switch=6, scored=most)
        side = Asked(engine, lambda text: (), lambda tokens: "", frozenset(), lambda name: ())
        nats.append(surprise(side, question))
    assert np.ptp(nats) < 1e-6
