"""Sampling against transformers' processors and against exact distributions."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remora_agent.runtime.api import SamplingParams
from remora_agent.runtime.distribution import kept, weights_of
from remora_agent.runtime.drawing import HEAD, drawn
from remora_agent.runtime.sampling import Sampler
from remora_contract.errors import EngineFault

PARAMS = [
    SamplingParams(1.0),
    SamplingParams(0.7, top_k=5),
    SamplingParams(1.3, top_p=0.9),
    SamplingParams(0.5, top_k=7, top_p=0.6),
    SamplingParams(2.0, top_k=1000, top_p=0.05),
    SamplingParams(1.0, top_k=1),
    SamplingParams(1.0, min_p=0.1),
    SamplingParams(1.5, top_k=30, top_p=0.95, min_p=0.05),
    SamplingParams(1.0, min_p=1.0),
]


def theirs(logits, params):
    """Probabilities [vocab] after transformers' warpers, in its order."""
    import torch
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.set_num_threads(1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    scores = warpers(None, torch.from_numpy(logits)[None])
    return torch.softmax(scores.double(), -1)[0].numpy()


def ours(logits, params):
    ids, weights = kept(logits, params)
    dense = np.zeros(len(logits))
    dense[slice(None) if ids is None else ids] = weights
    return dense / dense.sum()


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("vocab", [3, 40, 5000, 150_001])
def test_kept_tokens_and_probabilities_are_transformers_own(params, vocab):
    logits = np.random.default_rng(vocab).standard_normal(vocab).astype(np.float32) * 3
    mine, reference = ours(logits, params), theirs(logits, params)
    assert (np.flatnonzero(mine) == np.flatnonzero(reference)).all()
    np.testing.assert_allclose(mine, reference, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("head", [1, 4, HEAD])
@pytest.mark.parametrize("params", PARAMS)
def test_draws_follow_the_distribution(params, head):
    logits = np.random.default_rng(1).standard_normal(30).astype(np.float32) * 2
    expected, draws = ours(logits, params), 20_000
    sampler = Sampler(params, seed=3, head=head)
    counts = np.bincount([sampler.draw(logits) for _ in range(draws)], minlength=30)
    assert (counts[expected == 0] == 0).all()
    often = expected * draws >= 5
    chi2 = ((counts - expected * draws)[often] ** 2 / (expected * draws)[often]).sum()
    freedom = max(1, int(often.sum()) - 1)
    # Five standard deviations above the mean of chi-square.
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def plainly_drawn(logits, params, uniforms):
    """As drawing.py says it, of the tokens that are kept; and by how much of the sum another number
    or another rounding would have to differ for another token."""
    ids, weights = kept(logits, params)
    ids = np.arange(len(logits)) if ids is None else ids
    edge = nucleus_margin(logits, params)
    left = weights.sum(dtype=np.float64)
    order = sorted(range(len(ids)), key=lambda i: (-logits[ids[i]], ids[i]))
    head, behind = order[: len(uniforms) - 1], sorted(order[len(uniforms) - 1 :])
    for i, number in zip(head, uniforms, strict=False):
        if number * left < weights[i]:
            return ids[i], min(edge, abs(number * left - weights[i]) / left)
        left -= weights[i]
    sums = np.cumsum(weights[behind], dtype=np.float64)
    target = uniforms[-1] * sums[-1]
    at = int(np.searchsorted(sums, target, side="right"))
    return ids[behind[at]], min(edge, np.abs(sums - target).min() / sums[-1])


def nucleus_margin(logits, params):
    """How near top_p is to the share of so many of the largest: rounding decides who is kept."""
    if params.top_p == 1:
        return 1.0
    _, weights = kept(logits, dataclasses.replace(params, top_p=1.0, min_p=0.0))
    shares = np.cumsum(np.sort(weights)[::-1], dtype=np.float64) / weights.sum(dtype=np.float64)
    return np.abs(shares - params.top_p).min()


@example(1116, 3, 4.0, True, 1, 0.3, 0, 0.5, 0.0)
@settings(max_examples=400, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 3, 60, 700]),
    st.sampled_from([0.1, 1.0, 4.0]),
    st.booleans(),
    st.sampled_from([1, 8, 64]),
    st.sampled_from([0.3, 1.0, 30.0]),
    st.sampled_from([0, 0, 5, 50]),
    st.sampled_from([1.0, 1.0, 0.5, 0.9, 0.99]),
    st.sampled_from([0.0, 0.0, 0.01, 0.3]),
)
def test_a_token_is_drawn_as_it_is_said(seed, vocab, spread, coarse, head, heat, k, p, floor):
    random = np.random.default_rng(seed)
    logits = (random.standard_normal(vocab) * spread).astype(np.float32)
    if coarse:
        logits = np.round(logits)
    logits[1:][random.random(vocab - 1) < 0.2] = -np.inf
    params, near = SamplingParams(heat, k, p, min_p=floor), 0
    for _ in range(10):
        uniforms = random.random(head + 1)
        expected, margin = plainly_drawn(logits, params, uniforms)
        near += margin < 1e-5
        if drawn(logits, params, uniforms) != expected:
            near -= 1  # rounding decides
    assert near >= 0


def test_different_logits_of_one_weight_are_drawn_by_their_logits():
    """A nucleus that ends among them has the largest logits, as the head of the draw does."""
    logits = np.arange(200, dtype=np.float32)
    params = SamplingParams(1e30, top_p=0.5)
    uniforms = np.random.default_rng(0).random((4000, 9))
    for numbers in uniforms:
        numbers[:8] = np.maximum(numbers[:8], 0.02)  # of the head none
    tokens = {drawn(logits, params, numbers) for numbers in uniforms}
    assert len(tokens) == 100 - 8 and not tokens & set(range(192, 200))


def test_zero_temperature_takes_the_largest_and_the_first_of_equals():
    assert Sampler(SamplingParams(), 0).draw(np.array([1, 3, 3, 2], np.float32)) == 1


@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize(
    ("temperature", "drawn"), [(1e-300, {3}), (1e-46, {3}), (1e300, {0, 1, 3})]
)
def test_a_temperature_that_no_float32_holds_is_the_nearest_that_one_does(temperature, drawn, cut):
    sampler = Sampler(SamplingParams(temperature, seed=1, **cut), 0)
    logits = np.array([1, 3, -np.inf, 3.5], np.float32)
    assert {sampler.draw(logits) for _ in range(50)} <= drawn


def test_one_seed_gives_one_sequence_whatever_other_rows_draw():
    logits = np.random.default_rng(5).standard_normal((20, 100)).astype(np.float32)
    params = SamplingParams(1.0, top_p=0.95, seed=11)
    alone, beside, other = Sampler(params, 0), Sampler(params, 1), Sampler(params, 2)
    first = [alone.draw(row) for row in logits]
    second = []
    for row in logits:
        other.draw(row[::-1])
        second.append(beside.draw(row))
    assert first == second
    unseeded = SamplingParams(1.0, top_p=0.95)
    assert [Sampler(unseeded, 1).draw(r) for r in logits] != [
        Sampler(unseeded, 2).draw(r) for r in logits
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_engine_fault(bad, temperature):
    logits = np.array([0, bad, 1], np.float32)
    with pytest.raises(EngineFault):
        Sampler(SamplingParams(temperature), 0).draw(logits)


def test_masked_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0, -np.inf, 0], np.float32)
    sampler = Sampler(SamplingParams(5.0), 0)
    assert {sampler.draw(logits) for _ in range(200)} == {1, 3}


@example([-6e-15, 0.0], 1.0, 0, 0.5)
@example([0.0, 0.5, 1e-38], 1.0, 0, 0.5)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=300),
    st.floats(1e-6, 100),
    st.integers(0, 400),
    st.floats(0.001, 1),
)
def test_the_most_likely_token_always_stays_and_weights_are_finite(logits, heat, top_k, top_p):
    array = np.array(logits, np.float32)
    params = SamplingParams(heat, top_k, top_p, seed=0)
    ids, weights = kept(array, params)
    assert np.isfinite(weights).all() and weights.sum() > 0
    ids = np.arange(len(array)) if ids is None else ids
    assert (np.diff(ids) > 0).all()
    assert weights.max() == 1
    assert drawn(array, params, np.zeros(HEAD + 1)) == array.argmax()
    # Different logits may have one weight: which of those at the nucleus' end stay is drawing's.
    assert weights_of(array, heat)[Sampler(params, 0).draw(array)] >= weights.min()


def plain_nucleus(logits, top_p):
    """By sorting everything: the fewest largest whose share reaches top_p, first of equals."""
    weights = np.exp(logits - logits.max())
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: int(np.searchsorted(sums, top_p * sums[-1])) + 1])


@given(
    st.lists(st.integers(-8, 8), min_size=1, max_size=400),
    st.sampled_from([0.0, 1e-3, 0.25, 1.0, 8.0]),
    st.floats(0.001, 0.999),
)
def test_the_nucleus_is_that_of_a_full_sort_for_flat_and_for_steep_logits(steps, scale, top_p):
    logits = np.array(steps, np.float32) * np.float32(scale)
    expected = plain_nucleus(logits, top_p)
    ids, _ = kept(logits, SamplingParams(1.0, top_p=top_p))
    # A share may be within rounding of top_p: one more or less then.
    assert set(ids) == set(expected) or abs(len(ids) - len(expected)) == 1


def test_a_flat_nucleus_over_a_large_vocabulary_costs_a_few_passes_over_it():
    logits = np.random.default_rng(0).standard_normal(151_936).astype(np.float32) * 0.5
    sampler = Sampler(SamplingParams(1.0, top_p=0.95), 0)
    classes = np.arange(len(logits)) % 16_000
    one_pass_s = _best_s(lambda: np.bincount(classes, logits))
    assert _best_s(lambda: sampler.draw(logits)) < 30 * one_pass_s


def _best_s(work):
    seconds = []
    for _ in range(7):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return min(seconds)
