"""How a token is drawn from what top_k, top_p and min_p keep. Pure.

The HEAD largest logits are asked in turn, the largest first, of equals the lowest id. Token i, of
weight w_i, is taken where

    u_i * left_i < w_i        left_i = sum of the kept weights from i on

with a uniform number u_i of its own: with its share of what is left. Where none is taken, one more
number inverts the cumulative sum of the kept tokens behind the head, in the order of their ids. So
every token comes with its own probability; and of the tokens behind the head nothing but the sum
of their weights counts before it is clear that one of them comes, and that roughly: an error of e
in all that is left behind token i changes the answer for e / left_i of all numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import SamplingParams
from remora_agent.runtime.distribution import (
    Ids,
    Logits,
    below_kth,
    group_maxima,
    invert,
    kept,
    likeliest,
    places_in,
    span_sums,
    weights_of,
)

HEAD = 256  # part of what a seed means: another number, other tokens
Uniforms = NDArray[np.float64]  # [head + 1] in [0, 1), the last of them for what is behind
Range = tuple[float, float]  # a sum is not less than the first, not more than the second
_EXP_ROUNDING = 1e-5  # of a weight


@dataclass(frozen=True)
class Head:
    """The largest logits, largest first, and a bound of all others."""

    ids: Ids  # [n]
    values: Logits  # [n]
    weights: NDArray[np.float32]  # [n], of the largest 1
    most: float  # no other logit is larger; -inf: no other token may come
    edge: float  # the weight of `most`
    vocab: int

    @cached_property
    def sums(self) -> NDArray[np.float64]:
        return np.cumsum(self.weights, dtype=np.float64)

    def first(self, count: int) -> Head:
        """Nothing but these."""
        return Head(
            self.ids[:count], self.values[:count], self.weights[:count], -np.inf, 0.0, self.vocab
        )


def drawn(logits: Logits, params: SamplingParams, uniforms: Uniforms) -> int:
    """A token of logits [vocab], finite or -inf, at a temperature above 0.

    The weights of all tokens are computed only where a bound of their sum does not do.
    """
    count = len(uniforms) - 1
    maxima, size = group_maxima(logits, count)
    ids = likeliest(logits, count, below_kth(maxima, count))
    head = head_of(logits, ids, count, params.temperature)
    whole = _Whole(logits, params, ids)
    chosen = cut_head(head, params)

    def bound() -> Range:
        return 0.0, _bound(head, maxima, size, params.temperature)

    at = taken(chosen, kept_sum(chosen, params, bound), uniforms)
    if at is None:
        at = taken(chosen, kept_sum(chosen, params, whole.rest), uniforms)
    return whole.drawn(head, uniforms) if at is None else int(chosen.ids[at])


def head_of(logits: Logits, ids: Ids, count: int, temperature: float) -> Head:
    """Of `ids`, those of the `count` largest logits that are not -inf."""
    values = logits[ids]
    weights = weights_of(values, temperature)
    if len(ids) < count or count == len(logits):
        return Head(ids, values, weights, -np.inf, 0.0, len(logits))
    return Head(ids, values, weights, float(values[-1]), float(weights[-1]), len(logits))


def _bound(head: Head, maxima: Logits, size: int, temperature: float) -> float:
    """What the weights of all others are not above, together: none of a group weighs more than its
    maximum, and none at all more than the edge."""
    bounds = np.append(np.minimum(maxima, np.float32(head.most)), head.values[0])
    grouped = size * float(weights_of(bounds, temperature)[:-1].sum())
    apart = head.vocab - size * len(maxima)
    return (grouped + apart * head.edge) * (1 + _EXP_ROUNDING)


class _Whole:
    """Everything that is not the head."""

    def __init__(self, logits: Logits, params: SamplingParams, head: Ids) -> None:
        self._logits = logits
        self._params = params
        self._head = head

    @cached_property
    def _behind(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
        """Weights, 0 for the head's; those; sums of spans."""
        weights = weights_of(self._logits, self._params.temperature)
        of_head = weights[self._head]
        weights[self._head] = 0
        return weights, of_head, span_sums(weights)

    def rest(self) -> Range:
        total = float(self._behind[2].sum())
        return total, total

    def drawn(self, head: Head, uniforms: Uniforms) -> int:
        """By the kept tokens themselves: the head's first, then those behind it."""
        ids, weights, sums = self._kept(head)
        head = head.first(len(weights))
        behind = float(sums.sum())
        total = float(head.sums[-1]) + behind
        found = taken(head, (total, total), uniforms)
        if found is None and behind > 0:
            at = invert(weights, sums, float(uniforms[-1]))
            return at if ids is None else int(ids[at])
        # Rounding may leave out the last one that has a weight.
        return int(head.ids[np.flatnonzero(head.weights)[-1] if found is None else found])

    def _kept(self, head: Head) -> tuple[Ids | None, NDArray[np.float32], NDArray[np.float64]]:
        """Token ids, ascending; their weights, 0 for the head's; sums of spans."""
        params = self._params
        by_k = 0 < params.top_k < len(self._logits)
        if by_k:
            ids, weights = kept(self._logits, params)
        else:
            weights, of_head, sums = self._behind
            if params.top_p >= 1 and params.min_p == 0:
                return None, weights, sums
            weights[self._head] = of_head
            ids, weights = kept(self._logits, params, weights)
        assert ids is not None
        first = head.ids[: len(ids)]
        places = places_in(ids, first)
        surplus = len(first) - len(places)
        smallest = weights.min() if surplus else 0.0
        weights[places] = 0
        if surplus:
            _drop_last(weights, smallest, surplus)
        return ids, weights, span_sums(weights)


def _drop_last(behind: NDArray[np.float32], smallest: float | np.float32, surplus: int) -> None:
    """At a high temperature different logits may have one weight: of a nucleus' smallest weights
    the head's come first, so that as many others go."""
    behind[np.flatnonzero(behind == smallest)[-surplus:]] = 0


def cut_head(head: Head, params: SamplingParams) -> Head:
    """What is left by top_k, where that is all within the head: those equal to the k-th stay."""
    if not 0 < params.top_k <= len(head.ids) or params.top_k >= head.vocab:
        return head
    last = head.values[params.top_k - 1]
    return head.first(int(np.count_nonzero(head.values >= last))) if last > head.most else head


def kept_sum(head: Head, params: SamplingParams, rest: Callable[[], Range]) -> Range:
    """Least and most of the sum of weights that are kept, of a head after `cut_head`. `rest` says
    those of all others, and is asked where they matter."""
    sums, floor = head.sums, _above_min_p(head, params.min_p)
    ceiling = np.inf if floor is None else float(sums[floor - 1])
    if floor is not None and params.top_p >= 1:
        return ceiling, ceiling
    behind = (0.0, 0.0) if head.most == -np.inf else rest()
    if 0 < params.top_k < head.vocab:  # the k largest end somewhere behind the head
        behind = 0.0, behind[1]
    least, most = float(sums[-1]) + behind[0], float(sums[-1]) + behind[1]
    if params.top_p < 1:
        least, most = _nucleus(head, params.top_p, least, most)
    if floor is None and params.min_p > 0:
        out = (head.vocab - len(head.ids)) * params.min_p
        least = max(min(least, float(sums[-1])), least - out)
    return min(least, ceiling), min(most, ceiling)


def _above_min_p(head: Head, min_p: float) -> int | None:
    """How many min_p keeps; None where some may be behind the head."""
    if min_p == 0:
        return len(head.ids) if head.most == -np.inf else None
    count = int(np.count_nonzero(head.weights >= np.float32(min_p)))
    inside = count < len(head.ids) or head.edge * (1 + _EXP_ROUNDING) < min_p
    return count if inside else None


def _nucleus(head: Head, top_p: float, least: float, most: float) -> Range:
    """Of the sum of the nucleus, by those of the sum of all."""
    sums, count = head.sums, len(head.ids)
    fewest = int(np.searchsorted(sums, top_p * least))
    widest = int(np.searchsorted(sums, top_p * most))
    return (
        float(sums[fewest]) if fewest < count else top_p * least,
        float(sums[widest]) if widest < count else min(most, top_p * most + head.edge),
    )


def taken(head: Head, kept: Range, uniforms: Uniforms) -> int | None:
    """The index of the token that is taken; None where none of the head is, or another one for
    another sum in the range `kept`: the less is left, the sooner one is taken."""
    count = len(head.ids)
    numbers, weights = uniforms[:count], head.weights.astype(np.float64)
    before = np.concatenate([[0.0], head.sums[:-1]])

    def first(total: float) -> int:
        left = total - before
        with np.errstate(invalid="ignore"):  # 0 times infinite
            hits = numbers * left < weights
        hits &= left > 0
        return int(hits.argmax()) if hits.any() else count

    least, most = kept
    last = first(most)
    if last == count or (least < most and _earlier(numbers, weights, least - before, last)):
        return None
    return last


def _earlier(
    numbers: Uniforms, weights: NDArray[np.float64], left: NDArray[np.float64], last: int
) -> bool:
    """Whether one before `last` would be taken; one that is out of the kept ones counts as such."""
    early = (numbers[:last] * left[:last] < weights[:last]) | (left[:last] <= 0)
    return bool(early.any() or left[last] <= 0)
