"""Which tokens may be drawn from logits, with which weights, and which of them a uniform number
picks. Pure: sampling.py says the rules.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import SamplingParams

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
_CLASS_SHIFT = 16  # of a float32's 32 bits: leaves sign, exponent and 7 bits of the fraction
_BLOCK = 64
_SPAN = 512
_SMALLEST = np.float32(-87)  # e^-87 is the smallest normal float32
_TEMPERATURES = np.finfo(np.float32)  # beyond it a float32 is 0 or infinite


def kept(
    logits: Logits, params: SamplingParams
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """Token ids that may be drawn, ascending (None: all), and their unnormalised weights.

    `params.temperature` is positive here and the logits are finite or -inf.
    """
    ids: NDArray[np.int64] | None = None
    if 0 < params.top_k < len(logits):
        ids = largest(logits, params.top_k)
        logits = logits[ids]
    return cut(ids, weights_of(logits, params.temperature), params)


def cut(
    ids: Ids | None, weights: NDArray[np.float32], params: SamplingParams
) -> tuple[Ids | None, NDArray[np.float32]]:
    """What top_p and min_p keep of tokens and their weights, the largest of which is 1."""
    if params.top_p < 1:
        ids, weights = _picked(ids, weights, _nucleus(weights, params.top_p))
    if params.min_p > 0:  # of the largest, which is 1
        ids, weights = _picked(ids, weights, np.flatnonzero(weights >= np.float32(params.min_p)))
    return ids, weights


def _picked(
    ids: NDArray[np.int64] | None, weights: NDArray[np.float32], at: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return (at if ids is None else ids[at]), weights[at]


def weights_of(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """exp((logit - max) / temperature), 0 where float32 would be denormal: those are slow, and
    1e-38 of the most likely token's weight is never drawn."""
    temperature = usable_temperature(temperature)
    with np.errstate(over="ignore"):  # -inf is what is meant there
        scaled = (logits - logits.max()) / np.float32(temperature)
    weights: NDArray[np.float32] = np.exp(np.maximum(scaled, _SMALLEST))
    weights[scaled < _SMALLEST] = 0
    return weights


def usable_temperature(temperature: float) -> float:
    """A normal float32."""
    return min(max(temperature, float(_TEMPERATURES.tiny)), float(_TEMPERATURES.max))


def invert(weights: NDArray[np.float32], uniform: float) -> int:
    """The index where the cumulative share passes `uniform` in [0, 1); never one of weight 0.

    First among the sums of spans, then within one: a running sum over a whole vocabulary costs
    more than everything else here.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _SPAN)).astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(sums)])
    target = uniform * before[-1]
    span = _passing(before[1:], target, sums)
    inside = weights[span * _SPAN : (span + 1) * _SPAN].astype(np.float64)
    return span * _SPAN + _passing(np.cumsum(inside), target - before[span], inside)


def _passing(cumulative: NDArray[np.float64], target: float, weights: NDArray[np.float64]) -> int:
    """The first index above `target`, or the last with a weight where rounding left none."""
    at = int(np.searchsorted(cumulative, target, side="right"))
    return at if at < len(weights) else int(np.flatnonzero(weights)[-1])


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest largest weights whose share reaches `top_p`; of equals
    those that come first.

    Sums by coarse classes of size find the class in which the share is reached, so that only its
    members are sorted, however flat the distribution. The bits of floats that are not negative
    have the floats' order: a class is all that share exponent and first bits of the fraction.
    """
    classes = weights.view(np.int32) >> _CLASS_SHIFT
    reached = np.cumsum(np.bincount(classes, weights)[::-1])  # from the largest class on
    enough = top_p * reached[-1]
    last = int(np.searchsorted(reached, enough))
    members = np.sort(weights[classes == len(reached) - 1 - last])[::-1]
    before = reached[last - 1] if last else 0.0
    sums = before + np.cumsum(members, dtype=np.float64)
    # Rounding may leave the last sum just short of `enough`.
    needed = min(int(np.searchsorted(sums, enough)) + 1, len(members))
    smallest = members[needed - 1]
    return those_from(weights, smallest, needed - int(np.count_nonzero(members > smallest)))


def those_from(weights: NDArray[np.float32], smallest: np.float32, equals: int) -> Ids:
    """Indices, ascending, of weights above `smallest` and of the first `equals` equal to it."""
    kept = weights > smallest
    kept[np.flatnonzero(weights == smallest)[:equals]] = True
    return np.flatnonzero(kept)


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Indices, ascending, of all values not below the `count`-th largest.

    The count-th largest of the blocks' maxima is a lower bound, so that only the few values above
    it are partitioned.
    """
    if count >= len(values):
        return np.arange(len(values))
    whole = len(values) // _BLOCK * _BLOCK
    maxima = values[:whole].reshape(-1, _BLOCK).max(axis=1)
    if count > len(maxima):
        return np.flatnonzero(values >= _kth_largest(values, count))
    candidates = np.flatnonzero(values >= _kth_largest(maxima, count))
    return candidates[values[candidates] >= _kth_largest(values[candidates], count)]


def _kth_largest(values: NDArray[np.float32], k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])
