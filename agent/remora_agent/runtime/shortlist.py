"""Whether a row's largest logits say which token the request gets, and how likely it was. Pure.

An engine that returns a `Shortlist` gives the K largest logits of a row, those of the tokens that
it watches, and of the others only a bound and a sum. Known logits above the bound are the first of
the head (drawing.py); what is behind them has a least and a most sum. A token is drawn where all
logits would give the same one, by the same arithmetic and the same random numbers: where one of the
known is taken whatever the sum is between the two. Otherwise, mostly because the draw is of a token
that is not known, nothing is drawn, and the row's logits are read back.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from remora_agent.engine.protocol import Shortlist, Watch
from remora_agent.runtime.api import SamplingParams, TokenLogprob
from remora_agent.runtime.distribution import Ids, Logits, usable_temperature, weights_of
from remora_agent.runtime.drawing import Head, Range, Uniforms, cut_head, kept_sum, taken

_TAIL_ROUNDING = 1e-3  # of a sum over a vocabulary in float32, in any order
_BELOW_ROUNDING = 1e-5  # of a sum of some in float32, as with all logits
_SUM_ROUNDING = 1e-9  # of sums in float64, of the whole
_DENORMAL = 1.2e-38  # what a device may take for 0, a token
_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Candidates:
    """What is known of a row's logits after penalties: those of the tokens `ids` [n], ascending,
    and of the others that none is above `most` (-inf: none may be drawn), and that `lowered` of
    them at most are below what the engine found."""

    ids: Ids
    values: Logits  # [n]
    most: float
    vocab: int
    lowered: int

    @property
    def certain(self) -> bool:
        """Whether the largest of all is known, and is one that may be drawn."""
        return bool(self.values.max() > self.most)


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


def picked(
    found: Candidates,
    params: SamplingParams,
    tail: Callable[[float], Range],
    uniforms: Uniforms,
) -> int | None:
    """The token that `drawing.drawn` takes of all logits; None where that is not known. `tail`
    gives the sum of what is not known as the engine found it, for a largest value."""
    if not found.certain:
        return None
    order = np.argsort(-found.values, kind="stable")
    values = found.values[order]
    weights = weights_of(values, params.temperature)
    count = min(int(np.count_nonzero(values > found.most)), len(uniforms) - 1)
    most = max(found.most, float(values[count])) if count < len(values) else found.most
    bounds = np.array([values[0], most, found.most], np.float32)
    edge, unknown = weights_of(bounds, params.temperature)[1:].tolist()
    head = Head(found.ids[order[:count]], values[:count], weights[:count], most, edge, found.vocab)

    def rest() -> Range:
        below = float(weights[count:].sum(dtype=np.float64))
        least, most = (0.0, 0.0) if found.most == -np.inf else tail(float(values[0]))
        least = max(0.0, least - found.lowered * unknown)
        slack = _BELOW_ROUNDING * below + _SUM_ROUNDING * (float(head.sums[-1]) + below + most)
        return max(0.0, below + least - slack), below + most + slack

    chosen = cut_head(head, params)
    at = taken(chosen, kept_sum(chosen, params, rest), uniforms)
    return None if at is None else int(chosen.ids[at])


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
