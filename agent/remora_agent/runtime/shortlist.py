"""Whether a row's largest logits say which token the request gets, and how likely it was. Pure.

An engine that returns a `Shortlist` gives the K largest logits of a row, those of the tokens that
penalties change, and of the others only a bound and a sum. A token is drawn from these where all
its logits would give the same one, by the same arithmetic and the same random number:

    greedy           the best is above everything that is not known
    top_k            so is the k-th
    top_p            the nucleus is the same whatever the tail's sum is within its rounding, and
                     its smallest member above everything that is not known
    min_p            nothing that is not known can be so likely
    temperature      everything that is not known has weight 0

Otherwise nothing is drawn, and the row's logits are read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Shortlist, Watch
from remora_agent.runtime.api import SamplingParams, TokenLogprob
from remora_agent.runtime.distribution import (
    Ids,
    Logits,
    cut,
    kept,
    largest,
    those_from,
    usable_temperature,
    weights_of,
)

Draws = tuple[Ids | None, NDArray[np.float32]]  # as `kept` returns them
_TAIL_ROUNDING = 1e-3  # of a sum over a vocabulary in float32, in any order
_SUM_ROUNDING = 1e-9  # of sums in float64, of the whole
_DENORMAL = 1.2e-38  # what a device may take for 0, a token
_EXP_ROUNDING = 1e-5  # of a weight
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Candidates:
    """What is known of a row's logits after penalties: those of the tokens `ids` [n], ascending,
    and of the others that none is above `most` (-inf: none may be drawn)."""

    ids: Ids
    values: Logits  # [n]
    most: float
    vocab: int

    @property
    def complete(self) -> bool:
        return self.most == -np.inf

    @property
    def certain(self) -> bool:
        """Whether the largest of all is known, and is one that may be drawn."""
        return bool(self.values.max() > self.most)

    def everywhere(self) -> Logits:
        """[vocab], -inf where nothing is known."""
        logits = np.full(self.vocab, -np.inf, np.float32)
        logits[self.ids] = self.values
        return logits


class ShortRow:
    """One row of a shortlist, and the way to all its logits."""

    def __init__(
        self, found: Shortlist, at: int, watch: Watch, vocab: int, read: Callable[[], Logits]
    ) -> None:
        self.vocab = vocab
        self._watch = watch
        self._ids = found.ids[at]
        self._logits = found.logits[at]
        self._watched = found.watched[at, : len(watch.ids)]
        self._tail = float(found.tail[at])
        self._tail_at = float(found.tail_at[at])
        self._read = read

    @cached_property
    def all(self) -> Logits:
        """[vocab], read back. Raises what the engine raises."""
        return self._read()

    @property
    def sound(self) -> bool:
        """Whether every logit is a number, and one is finite."""
        sums = self._tail + self._tail_at
        return math.isfinite(self.best + sums) and not math.isnan(float(self._logits.min()))

    @property
    def best(self) -> float:
        return float(self._logits[0])

    def first(self) -> int | None:
        """The first of the largest; None where that is not known."""
        if not self.best > self.least:
            return None
        if len(self._logits) == 1 or self._logits[1] < self._logits[0]:
            return int(self._ids[0])
        return int(self._ids[self._logits == self._logits[0]].min())

    @property
    def least(self) -> float:
        """No token outside has a larger logit; -inf where there is none outside."""
        return -np.inf if len(self._ids) == self.vocab else float(self._logits[-1])

    @cached_property
    def known(self) -> tuple[Ids, Logits, Ids]:
        """Tokens, ascending, their logits, and which of them are watched alone."""
        if not len(self._watch.ids):
            order = np.argsort(self._ids)
            return self._ids[order].astype(np.int64), self._logits[order], _NONE
        ids = np.concatenate([self._ids, self._watch.ids])
        ids, first = np.unique(ids, return_index=True)
        logits = np.concatenate([self._logits, self._watched])[first]
        return ids, logits, np.flatnonzero(first >= len(self._ids))

    def tail(self, best: float) -> tuple[float, float]:
        """Least and most of the sum of exp((logit - best) / temperature) over what is not known."""
        _, logits, alone = self.known
        temperature = np.float64(np.float32(self._watch.temperature))
        with np.errstate(over="ignore", invalid="ignore"):
            scale = np.exp((self.best - best) / temperature)
            whole = self._tail_at * scale
            apart = np.exp((logits[alone].astype(np.float64) - best) / temperature).sum()
            slack = _TAIL_ROUNDING * whole + _DENORMAL * self.vocab * scale
            rest = whole - apart
        if not np.isfinite(rest + slack):
            return 0.0, np.inf
        return max(0.0, float(rest - slack)), max(0.0, float(rest + slack))

    def total(self) -> float:
        """log of the sum of exp(logit) over all tokens."""
        own = np.exp(self._logits - self._logits[0]).sum(dtype=np.float64)
        return self.best + float(np.log(own + self._tail))


def watch(ids: Ids, params: SamplingParams) -> Watch:
    """Of a row whose logits of `ids` will change."""
    temperature = 1.0 if params.temperature == 0 else usable_temperature(params.temperature)
    return Watch(np.unique(ids) if len(ids) else _NONE, temperature)


def greedy(found: Candidates) -> int | None:
    """The first of the largest; None where that is not known."""
    return int(found.ids[found.values.argmax()]) if found.certain else None


def drawable(
    found: Candidates, params: SamplingParams, tail: Callable[[float], tuple[float, float]]
) -> Draws | None:
    """What `kept` returns for all logits, at least up to tokens of weight 0; None where that is
    not known. `tail` gives the sum's range for a largest value."""
    if not found.certain:
        return None
    values, most = found.values, found.most
    if found.complete:
        return kept(found.everywhere(), params)
    if 0 < params.top_k < found.vocab:
        return _of_largest(found, params)
    best = values.max()
    edge = float(weights_of(np.array([best, most], np.float32), params.temperature)[1])
    weights = weights_of(values, params.temperature)
    if params.top_p < 1:
        chosen = _nucleus(weights, params.top_p, tail(float(best)), edge)
    elif edge == 0:
        return kept(found.everywhere(), params)
    elif params.min_p > edge * (1 + _EXP_ROUNDING):
        chosen = np.arange(len(weights))
    else:
        return None
    if chosen is None:
        return None
    if params.min_p > 0:
        chosen = chosen[weights[chosen] >= np.float32(params.min_p)]
    return found.ids[chosen], weights[chosen]


def scored(row: ShortRow, token: int, top: int) -> TokenLogprob | None:
    """As logprobs.scored of all logits; None where that is not known."""
    ids, logits, _ = row.known
    top = min(top, row.vocab)
    at = int(np.searchsorted(ids, token))
    if not row.sound or top > len(ids) or at == len(ids) or ids[at] != token:
        return None
    ranked = np.argsort(-logits, kind="stable")[:top]
    if top and len(ids) < row.vocab and not logits[ranked[-1]] > row.least:
        return None
    total = row.total()
    likeliest = tuple((int(ids[i]), float(logits[i]) - total) for i in ranked)
    return TokenLogprob(token, float(logits[at]) - total, likeliest)


def _of_largest(found: Candidates, params: SamplingParams) -> Draws | None:
    """Every token that is among the `top_k` largest is known where the last of them is above the
    rest."""
    if params.top_k >= len(found.ids):
        return None
    ids = largest(found.values, params.top_k)
    if not found.values[ids].min() > found.most:
        return None
    return cut(found.ids[ids], weights_of(found.values[ids], params.temperature), params)


def _nucleus(
    weights: NDArray[np.float32], top_p: float, tail: tuple[float, float], edge: float
) -> Ids | None:
    """Indices of the nucleus among `weights` [n] and a tail whose members weigh at most `edge`."""
    ordered = np.sort(weights)[::-1]
    sums = np.cumsum(ordered, dtype=np.float64)
    least = top_p * (sums[-1] + tail[0]) * (1 - _SUM_ROUNDING)
    most = top_p * (sums[-1] + tail[1]) * (1 + _SUM_ROUNDING)
    last, latest = int(np.searchsorted(sums, least)), int(np.searchsorted(sums, most))
    if last != latest or last == len(ordered):
        return None
    smallest = ordered[last]
    if not smallest > edge * (1 + _EXP_ROUNDING):
        return None
    equals = last + 1 - int(np.count_nonzero(ordered > smallest))
    return those_from(weights, smallest, equals)
