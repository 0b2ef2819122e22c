"""Where an activated adapter begins to act: the search, the chunk borders, the mix of each step."""

import random
import time

import numpy as np
import pytest

from remora_agent.runtime.activation import activation_start
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.scheduler import Job, Scheduler, SchedulerLimits
from remora_agent.runtime.work import PrefillChunk
from tests.support.runtime import VOCAB, request


@pytest.mark.parametrize(
    ("prompt", "invocation", "start"),
    [
        ((1, 2, 3), (), 0),
        ((1, 2, 3), (1, 2, 3), 0),
        ((1, 2, 3), (3,), 2),
        ((9, 1, 2, 5, 1, 2, 5), (1, 2), 4),
        ((1, 2), (1, 2, 3), None),
        ((1, 2, 1), (2, 2), None),
        ((7, 7, 7, 7), (7, 7), 2),  # of overlapping occurrences the last one counts
        ((7, 8, 7, 8, 7, 1), (7, 8, 7), 2),
    ],
)
def test_the_last_occurrence_in_the_prompt_is_the_first_adapted_token(prompt, invocation, start):
    assert activation_start(prompt, invocation) == start


def test_the_search_finds_what_peft_finds():
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.variants import calculate_alora_offsets

    chance = random.Random(3)
    for _ in range(400):
        prompt = tuple(chance.choices(range(3), k=chance.randint(1, 14)))
        invocation = chance.choices(range(3), k=chance.randint(1, 5))
        config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation)
        (offset,) = calculate_alora_offsets({"a": config}, "a", torch.tensor([prompt]))
        theirs = None if offset is None else len(prompt) - offset
        assert activation_start(prompt, tuple(invocation)) == theirs, (prompt, invocation)


def test_a_hostile_prompt_and_pattern_cost_no_more_than_their_lengths():
    began = time.process_time()
    assert activation_start((1,) * 200_000, (2, *(1,) * 4095)) is None
    assert time.process_time() - began < 5


def chunks(borders, prompt_tokens=20, size=8):
    scheduler = Scheduler(SchedulerLimits(1, 4, 1000, size, 1.0))
    scheduler.submit(Job("a", prompt_tokens, borders=borders), 0.0)
    scheduler.admit("a", 0.0)
    found = []
    while isinstance(work := scheduler.next_work(), PrefillChunk):
        found.append((work.start, work.stop, work.last))
        scheduler.done(work)
    return found


def test_no_chunk_crosses_a_border():
    assert chunks(()) == [(0, 8, False), (8, 16, False), (16, 20, True)]
    stops = [stop for _, stop, _ in chunks((3, 10))]
    assert stops == [3, 8, 10, 16, 20]  # else at multiples of the size, whatever came before
    assert chunks((8, 19)) == [(0, 8, False), (8, 16, False), (16, 19, False), (19, 20, True)]


def spans(mixes, prompt, count, engine):
    """The reference model's greedy tokens, `mixes[p]` being the mix of the token at p."""
    state, answer = np.zeros(24), []
    for position, token in enumerate(prompt):
        state = engine._next(state, token, mixes(position))
    while len(answer) < count:
        answer.append(int((4 * engine._head @ state).astype(np.float32).argmax()))
        state = engine._next(state, answer[-1], mixes(len(prompt) + len(answer) - 1))
    return tuple(answer)


def test_several_activated_adapters_each_begin_at_their_own_token(serve):
    s = serve(
        {"a": 2, "b": 2, "plain": 2},
        options=RuntimeOptions(prefill_chunk=4),
        invocations={"a": (50, 51), "b": (60,)},
    )
    prompt = (1, 2, 60, 4, 5, 6, 50, 51, 9, 10, 11, 12)
    weights = {"a": 0.5, "b": 2.0, "plain": 1.0}
    starts = {"a": 6, "b": 2, "plain": 0}

    def mix(position):
        return {s.digests[n]: w for n, w in weights.items() if position >= starts[n]}

    heard = s.submit(request("r", prompt, 10, weights)).wait()
    assert heard.tokens == spans(mix, prompt, 10, s.engine)
    assert [(start, n) for _, start, n in s.engine.calls.prefills] == [
        (0, 2),
        (2, 2),
        (4, 2),
        (6, 2),
        (8, 4),
    ]
    told = {a.name: a.active_from for a in heard.finished.provenance.adapters}
    assert told == starts


def test_an_adapter_that_is_not_invoked_is_the_base_model_and_is_not_even_loaded(serve):
    s = serve({"a": 2}, invocations={"a": (50, 51)})
    prompt = (50, 1, 51, 50)
    heard = s.submit(request("r", prompt, 10, {"a": 1.0})).wait()
    assert heard.tokens == s.engine.solo(prompt, 10)
    assert s.engine.calls.adds == []
    (told,) = heard.finished.provenance.adapters
    assert (told.name, told.active_from) == ("a", None)


def test_what_the_model_generates_does_not_invoke(serve):
    s = serve({"a": 2})
    first = s.submit(request("r", (1, 2, 3), 1)).wait().tokens[0]
    s = serve({"a": 2}, invocations={"a": (first,)})
    heard = s.submit(request("r", (1, 2, 3), 12, {"a": 1.0})).wait()
    assert heard.tokens == s.engine.solo((1, 2, 3), 12)


def test_the_listing_tells_the_invocation_tokens(serve):
    s = serve({"a": 2, "b": 2}, invocations={"a": (VOCAB - 1,)})
    assert [i.invocation_tokens for i in s.runtime.adapters.list()] == [(VOCAB - 1,), ()]
