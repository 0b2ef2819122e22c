"""Logprobs are torch's log_softmax of the raw logits, in each Delta one for each token."""

from dataclasses import replace

import numpy as np
import pytest

from remora_agent.runtime.api import Delta, Finished, SamplingParams, Scoring
from remora_agent.runtime.logprobs import scored
from remora_contract.errors import RequestInvalid
from tests.support.runtime import request


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
