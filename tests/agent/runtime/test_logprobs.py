"""Logprobs are torch's log_softmax of the raw logits, in each Delta one for each token."""

from dataclasses import replace

import numpy as np
import pytest

from remora_agent.runtime.api import Delta, Finished, PromptScored, SamplingParams, Scoring
from remora_agent.runtime.logprobs import scored
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.errors import RequestInvalid, Unsupported
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import VOCAB, request


@pytest.mark.parametrize("vocab", [3, 300, 151_936])
def test_they_are_the_log_softmax_of_the_raw_logits(vocab):
    import torch

    logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32) * 5
    theirs = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    values, ids = theirs.topk(min(vocab, 20))
    ours = scored(logits, 2, 20)
    assert ours.logprob == pytest.approx(float(theirs[2]), abs=2e-5)
    assert [token for token, _ in ours.top] == ids.tolist()
    np.testing.assert_allclose([value for _, value in ours.top], values, atol=2e-5)


def test_equals_come_in_the_order_of_their_ids_and_none_asked_for_gives_none():
    logits = np.array([1, 2, 2, 2, 0], np.float32)
    assert [token for token, _ in scored(logits, 0, 2).top] == [1, 2]
    assert scored(logits, 0, 0).top == ()


def test_an_impossible_token_has_probability_zero():
    logits = np.array([0, -np.inf], np.float32)
    assert scored(logits, 1, 2).logprob == -np.inf


def ask(serve, scoring, **more):
    s = serve()
    made = request("a", (1, 2, 3), max_tokens=12, **more)
    return s.submit(replace(made, scoring=scoring)).wait()


def test_each_delta_has_one_for_each_of_its_tokens_also_when_text_is_held_back(serve):
    plain = ask(serve, Scoring())
    asked = ask(serve, Scoring(top=3))
    assert isinstance(asked.events[-1], Finished)
    assert asked.tokens == plain.tokens and asked.text == plain.text
    deltas = [e for e in asked.events if isinstance(e, Delta)]
    for delta in deltas:
        assert [p.token_id for p in delta.logprobs] == list(delta.token_ids)
        assert all(len(p.top) == 3 for p in delta.logprobs)
    assert any(len(d.token_ids) > 1 for d in deltas)  # bytes of a broken character were held
    assert not any(e.logprobs for e in plain.events if isinstance(e, Delta))


def test_they_are_of_the_model_not_of_what_the_request_adds(serve):
    greedy = ask(serve, Scoring(top=0))
    first = greedy.tokens[0]
    biased = ask(serve, Scoring(top=1), sampling=SamplingParams(logit_bias=((first, -100.0),)))
    (score, *_), *_ = [e.logprobs for e in biased.events if isinstance(e, Delta)]
    assert score.token_id != first
    assert score.top[0][0] == first and score.top[0][1] > score.logprob


def test_more_than_the_bound_is_refused(serve):
    with pytest.raises(RequestInvalid, match="logprobs"):
        ask(serve, Scoring(top=21))


def by_hand(engine, tokens):
    """Logprob of each token from the second on, each read alone."""
    import torch

    found = []
    for position, token in enumerate(tokens[:-1]):
        logits = engine.prefill(0, np.array([token]), position)
        found.append(float(torch.log_softmax(torch.from_numpy(logits), -1)[tokens[position + 1]]))
    return found


@pytest.mark.parametrize("chunk", [3, 256])
def test_a_prompts_tokens_are_scored_by_what_comes_before_them(serve, chunk):
    s = serve(context=128, options=RuntimeOptions(prefill_chunk=chunk))
    prompt = tuple(np.random.default_rng(1).integers(0, 250, 40).tolist())
    made = replace(request("a", prompt, 6), scoring=Scoring(prompt_top=2))
    heard = s.submit(made).wait()
    event = heard.events[1]
    assert isinstance(event, PromptScored)
    assert [p.token_id for p in event.logprobs] == list(prompt[1:])
    assert all(len(p.top) == 2 for p in event.logprobs)
    assert heard.tokens == s.solo(request("b", prompt, 6))
    fresh = ReferenceEngine(4, 128, VOCAB, 16)
    np.testing.assert_allclose(
        [p.logprob for p in event.logprobs], by_hand(fresh, prompt), atol=1e-4
    )


def test_a_scored_prompt_is_read_whole_though_its_beginning_is_cached(serve):
    s = serve(context=128)
    prompt = tuple(range(60))
    s.submit(request("first", prompt, 4)).wait()
    again = s.submit(replace(request("again", prompt, 4), scoring=Scoring(prompt_top=0))).wait()
    assert len(again.events[1].logprobs) == 59


def test_a_prompt_of_one_token_has_none(serve):
    s = serve()
    heard = s.submit(replace(request("a", (5,), 4), scoring=Scoring(prompt_top=3))).wait()
    assert heard.events[1] == PromptScored(())


def test_more_values_than_a_message_takes_are_refused(serve):
    s = serve(context=8192)
    made = replace(request("a", (1,) * 5000, 4), scoring=Scoring(prompt_top=20))
    with pytest.raises(RequestInvalid, match="105000 values"):
        s.submit(made)


def test_an_engine_that_cannot_is_said_so(serve):
    s = serve(scored=0)
    made = replace(request("a"), scoring=Scoring(prompt_top=0))
    with pytest.raises(Unsupported, match="prompt_logprobs"):
        s.submit(made)
