"""Which tokens may be drawn from logits, and with which weights. Pure: sampling.py says the rules,
drawing.py how one is drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import SamplingParams

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
_CLASS_SHIFT = 16  # of a float32's 32 bits: leaves sign, exponent and 7 bits of the fraction
_GROUPS = 4  # for each value that is looked for
_FEW = 4
_SPAN = 512
_SMALLEST = np.float32(-87)  # e^-87 is the smallest normal float32
_TEMPERATURES = np.finfo(np.float32)  # beyond it a float32 is 0 or infinite


def kept(
    logits: Logits, params: SamplingParams, weights: NDArray[np.float32] | None = None
) -> tuple[Ids | None, NDArray[np.float32]]:
    """Token ids that may be drawn, ascending (None: all), and their unnormalised weights.

    `params.temperature` is positive here and the logits are finite or -inf; `weights` are theirs
    [vocab], where they are known already.
    """
    ids: Ids | None = None
    if 0 < params.top_k < len(logits):
        ids = largest(logits, params.top_k)
        weights = weights_of(logits[ids], params.temperature)
    elif weights is None:
        weights = weights_of(logits, params.temperature)
    if params.top_p < 1:
        ids, weights = _picked(ids, weights, _nucleus(weights, params.top_p))
    if params.min_p > 0:  # of the largest, which is 1
        ids, weights = _picked(ids, weights, np.flatnonzero(weights >= np.float32(params.min_p)))
    return ids, weights


def _picked(
    ids: Ids | None, weights: NDArray[np.float32], at: Ids
) -> tuple[Ids, NDArray[np.float32]]:
    return (at if ids is None else ids[at]), weights[at]


def weights_of(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """exp((logit - max) / temperature), 0 where float32 would be denormal: those are slow, and
    1e-38 of the most likely token's weight is never drawn."""
    temperature = usable_temperature(temperature)
    weights: NDArray[np.float32] = logits - logits.max()
    if temperature != 1:
        with np.errstate(over="ignore"):  # -inf is what is meant there
            weights /= np.float32(temperature)
    none = weights < _SMALLEST if weights.min() < _SMALLEST else None
    if none is not None:
        np.maximum(weights, _SMALLEST, out=weights)
    np.exp(weights, out=weights)
    if none is not None:
        weights[none] = 0
    return weights


def usable_temperature(temperature: float) -> float:
    """A normal float32."""
    return min(max(temperature, float(_TEMPERATURES.tiny)), float(_TEMPERATURES.max))


def span_sums(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    return np.add.reduceat(weights, np.arange(0, len(weights), _SPAN)).astype(np.float64)


def invert(weights: NDArray[np.float32], sums: NDArray[np.float64], uniform: float) -> int:
    """The index where the cumulative share passes `uniform` in [0, 1); never one of weight 0.

    First among the `span_sums`, then within one: a running sum over a whole vocabulary costs more
    than everything else here.
    """
    before = np.concatenate([[0.0], np.cumsum(sums)])
    target = uniform * before[-1]
    span = _passing(before[1:], target, sums)
    inside = weights[span * _SPAN : (span + 1) * _SPAN].astype(np.float64)
    return span * _SPAN + _passing(np.cumsum(inside), target - before[span], inside)


def _passing(cumulative: NDArray[np.float64], target: float, weights: NDArray[np.float64]) -> int:
    """The first index above `target`, or the last with a weight where rounding left none."""
    at = int(np.searchsorted(cumulative, target, side="right"))
    return at if at < len(weights) else int(np.flatnonzero(weights)[-1])


def _nucleus(weights: NDArray[np.float32], top_p: float) -> Ids:
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


def those_from(weights: NDArray[np.float32], smallest: float | np.float32, equals: int) -> Ids:
    """Indices, ascending, of weights above `smallest` and of the first `equals` equal to it."""
    kept = weights > smallest
    kept[np.flatnonzero(weights == smallest)[:equals]] = True
    return np.flatnonzero(kept)


def places_in(ids: Ids, wanted: Ids) -> Ids:
    """Indices in `ids`, ascending, of those of `wanted` that it has, in their order."""
    at = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    found: Ids = at[ids[at] == wanted]
    return found


def largest(values: NDArray[np.float32], count: int) -> Ids:
    """Indices, ascending, of all values not below the `count`-th largest."""
    if count >= len(values):
        return np.arange(len(values))
    candidates = np.flatnonzero(values >= below_kth(group_maxima(values, count)[0], count))
    return candidates[values[candidates] >= _kth_largest(values[candidates], count)]


def likeliest(values: NDArray[np.float32], count: int, floor: float) -> Ids:
    """Indices of the `count` largest values, largest first, of equals the first index first; only
    of values above -inf. The count-th largest is not below `floor`."""
    ids = np.flatnonzero(values >= floor if floor > -np.inf else values > -np.inf)
    found = values[ids]
    if len(ids) > _FEW * count:  # the rest is not worth sorting
        smallest = _kth_largest(found, count)
        chosen = those_from(found, smallest, count - int(np.count_nonzero(found > smallest)))
        ids, found = ids[chosen], found[chosen]
    return ids[np.argsort(-found, kind="stable")[:count]]


def group_maxima(values: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], int]:
    """The maxima of more than `k` groups of as many values each, and how many; the few last values
    may be in none. No group where there are too few values."""
    groups = _GROUPS * k
    size = len(values) // groups
    if size < 2:
        return np.zeros(0, np.float32), 0
    # Groups of values that are far apart: a maximum of whole slices is quick.
    return values[: groups * size].reshape(size, groups).max(axis=0), size


def below_kth(maxima: NDArray[np.float32], k: int) -> float:
    """A value that the k-th largest of all is not below, so that only the few values above it are
    sorted; -inf where there are no groups."""
    return _kth_largest(maxima, k) if len(maxima) else -np.inf


def _kth_largest(values: NDArray[np.float32], k: int) -> float:
    return float(np.partition(values, len(values) - k)[len(values) - k])
