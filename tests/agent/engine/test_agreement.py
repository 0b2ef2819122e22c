"""When a faster numeric form may stand for the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from remora_agent.engine.agreement import MOST_KL, compare, objections

LOGITS = arrays(np.float32, (5, 12), elements=st.floats(-30, 30, width=16))


@given(LOGITS)
def test_equal_logits_agree_wholly(logits):
    found = compare(logits, logits)
    assert (found.same_top, found.mean_kl, found.worst_shift) == (1.0, 0.0, 0.0)
    assert objections(found) == []


@given(LOGITS, st.floats(-8, 8, width=16))
def test_a_shift_of_all_logits_is_no_difference(logits, shift):
    found = compare(logits, logits + np.float32(shift))
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.worst_shift == pytest.approx(0, abs=1e-4) or logits.std(axis=1).min() < 1e-3


@given(LOGITS, LOGITS)
def test_divergence_is_never_negative(plain, other):
    assert compare(plain, other).mean_kl >= -1e-6


def _spread(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((8, 100)).astype(np.float32) * 3


def test_small_noise_is_allowed_and_large_noise_is_not():
    plain, noise = _spread(), _spread(1) / 3
    assert objections(compare(plain, plain + np.float32(0.05) * noise)) == []
    assert len(objections(compare(plain, plain + 3 * noise))) >= 2


def test_one_position_that_answers_otherwise_is_an_objection():
    plain = _spread()
    other = plain.copy()
    other[3, plain[3].argmin()] += 40.0
    assert any("a token wins" in w for w in objections(compare(plain, other)))


def test_a_divergence_over_the_bound_is_named_with_both():
    plain = _spread()
    found = compare(plain, plain + np.float32(0.4) * _spread(1) / 3)
    assert found.mean_kl > MOST_KL and f"over {MOST_KL}" in objections(found)[0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_never_agrees(value):
    other = _spread()
    other[0, 0] = value
    assert objections(compare(_spread(), other))
    assert objections(compare(other, other))


def test_too_few_positions_decide_nothing():
    assert objections(compare(_spread()[:3], _spread()[:3])) == [
        "only 3 positions could be compared"
    ]
    assert objections(compare(_spread()[:0], _spread()[:0]))
