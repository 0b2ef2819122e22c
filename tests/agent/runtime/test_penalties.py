"""Bias and penalties against transformers' processors and the formulas of OpenAI and vLLM."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.runtime.api import SamplingParams
from remora_agent.runtime.penalties import Penalties
from remora_agent.runtime.sampling import Sampler
from remora_contract.errors import RequestInvalid

VOCAB = 50
LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=120)
PENALTY = st.floats(-2, 2, width=32)


def penalised(logits, params, prompt, answer):
    penalties, out = Penalties(params, prompt), np.array(logits, np.float32)
    for token in answer:
        penalties.saw(token)
    penalties.apply(out)
    return out


@given(LOGITS, TOKENS, TOKENS, st.floats(0.5, 3))
def test_the_repetition_penalty_is_transformers_own_over_prompt_and_answer(
    logits, prompt, answer, penalty
):
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    params = SamplingParams(repetition_penalty=penalty)
    seen = torch.tensor([[*prompt, *answer]], dtype=torch.long)
    scores = torch.tensor([logits], dtype=torch.float32)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, scores)[0].numpy()
    np.testing.assert_allclose(penalised(logits, params, prompt, answer), theirs, rtol=3e-7, atol=0)


@given(LOGITS, TOKENS, TOKENS, PENALTY, PENALTY)
def test_presence_and_frequency_count_the_answer_alone(logits, prompt, answer, once, each):
    params = SamplingParams(presence_penalty=once, frequency_penalty=each)
    counts = np.bincount(np.array(answer, np.int64), minlength=VOCAB)
    expected = np.array(logits) - once * (counts > 0) - each * counts
    np.testing.assert_allclose(
        penalised(logits, params, prompt, answer), expected, rtol=1e-5, atol=1e-4
    )


@given(LOGITS, st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32)))
def test_a_bias_is_added_to_its_tokens_alone(logits, bias):
    params = SamplingParams(logit_bias=tuple(bias.items()))
    expected = np.array(logits, np.float32)
    for token, value in bias.items():
        expected[token] += np.float32(value)
    np.testing.assert_array_equal(penalised(logits, params, (1,), ()), expected)


def test_the_whole_order_is_bias_repetition_then_presence_and_frequency():
    params = SamplingParams(
        repetition_penalty=2.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias=((0, 3.0), (1, -3.0)),
    )
    out = penalised([1.0, 1.0, 1.0], params, (1,), (0, 0))
    np.testing.assert_array_equal(out, [(1 + 3) / 2 - 0.5 - 2 * 0.25, (1 - 3) * 2, 1])


def test_a_greedy_answer_is_transformers_own_with_a_repetition_penalty():
    """Token after token: what was drawn counts from the next draw on."""
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    rows = np.random.default_rng(3).standard_normal((60, VOCAB)).astype(np.float32)
    prompt, theirs = [3, 4, 5], []
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    for row in rows:
        seen = torch.tensor([[*prompt, *theirs]])
        theirs.append(int(processor(seen, torch.from_numpy(row)[None]).argmax()))
    sampler = Sampler(SamplingParams(repetition_penalty=1.7), 0, prompt)
    assert [sampler.draw(row) for row in rows] == theirs


def test_drawing_leaves_the_engines_logits_alone():
    logits = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)
    logits.flags.writeable = False
    params = SamplingParams(
        1.0, repetition_penalty=1.3, presence_penalty=1, logit_bias=((2, 5.0),), seed=1
    )
    sampler = Sampler(params, 0, (1, 2))
    for _ in range(5):
        sampler.draw(logits, np.ones(VOCAB, bool), np.array([4]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_that_may_not_come_never_do_and_none_left_is_an_error(temperature):
    logits = np.array([5, 4, 3, 2], np.float32)
    sampler = Sampler(SamplingParams(temperature, logit_bias=((0, 100.0),)), 0)
    allowed = np.array([False, True, True, False])
    assert {sampler.draw(logits, allowed, np.array([1])) for _ in range(20)} == {2}
    with pytest.raises(RequestInvalid, match="no token"):
        sampler.draw(logits, allowed, np.array([1, 2]))


def test_penalties_over_a_large_vocabulary_cost_less_than_a_few_passes_over_it():
    logits = np.random.default_rng(0).standard_normal(151_936).astype(np.float32)
    prompt = np.random.default_rng(1).integers(0, 151_936, 2000).tolist()
    params = SamplingParams(repetition_penalty=1.1, presence_penalty=0.5, frequency_penalty=0.5)
    plain, penalising = Sampler(SamplingParams(), 0), Sampler(params, 0, prompt)
    copy = np.empty_like(logits)
    pass_s = _best_s(lambda: np.copyto(copy, logits)) + _best_s(lambda: logits.argmax())
    extra_s = _best_s(lambda: penalising.draw(logits)) - _best_s(lambda: plain.draw(logits))
    assert extra_s < 20 * pass_s


def _best_s(work):
    seconds = []
    for _ in range(15):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return min(seconds)
