"""What a request adds to its logits before a token is drawn. Pure but for the tokens it has seen.

In this order, as transformers and vLLM apply them:

    logit += bias[token]                                          logit_bias
    logit  = logit / r if logit >= 0 else logit * r               repetition_penalty r, of every
                                                                  token in prompt or answer
    logit -= frequency * count[token] + presence                  of every token in the answer

Only entries of tokens concerned are touched: a step costs what was seen, not the vocabulary. A bias
below 0, r > 1, and presence and frequency of 0 or more never raise a logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import SamplingParams

Logits = NDArray[np.float32]
Ids = NDArray[np.int64]
_FIRST_ROOM = 64


class Penalties:
    """Of one request. Token ids are within the vocabulary, checked before."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        pairs = sorted(params.logit_bias)
        self._bias = np.array([value for _, value in pairs], np.float32)
        self._repetition = np.float32(params.repetition_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        repeats, counts = params.repetition_penalty != 1, self._presence or self._frequency
        self._biased = _Tokens([token for token, _ in pairs]) if pairs else None
        self._seen = _Tokens(prompt) if repeats else None
        self._answered = _Tokens(()) if counts else None
        self.active = bool(pairs or repeats or counts)

    @property
    def ids(self) -> Ids:
        """Tokens whose logits `apply` changes; some more than once."""
        counted = self._answered if self._seen is None else self._seen  # which has the answer too
        return _joined(t.ids for t in (self._biased, counted) if t is not None)

    @property
    def raised(self) -> Ids:
        """Those of `ids` whose logits may become larger, some more than once."""
        up = list[Ids]()
        if self._biased is not None:
            up.append(self._biased.ids[self._bias > 0])
        if self._seen is not None and self._repetition < 1:
            up.append(self._seen.ids)
        if self._answered is not None and (self._presence < 0 or self._frequency < 0):
            up.append(self._answered.ids)
        return _joined(up)

    def apply(self, logits: Logits, of: Ids | None = None) -> int:
        """Changes logits in place: [vocab], or those of the tokens `of` [n]. Returns how many other
        tokens' logits would change, at most."""
        others = 0
        if self._biased is not None:
            at, which = self._biased.among(of)
            logits[at] += self._bias[which]
            others += len(self._biased.ids) - len(at)
        if self._seen is not None:
            at, _ = self._seen.among(of)
            found = logits[at]
            logits[at] = np.where(found < 0, found * self._repetition, found / self._repetition)
            others += len(self._seen.ids) - len(at)
        if self._answered is not None:
            at, which = self._answered.among(of)
            logits[at] -= self._frequency * self._answered.counts[which] + self._presence
            others += len(self._answered.ids) - len(at)
        return others

    def saw(self, token: int) -> None:
        """The answer's next token."""
        if self._seen is not None:
            self._seen.add(token)
        if self._answered is not None:
            self._answered.add(token)


class _Tokens:
    """Distinct tokens and how often each came, in arrays that grow by doubling."""

    def __init__(self, tokens: Sequence[int]) -> None:
        ids, counts = np.unique(np.asarray(tokens, np.int64), return_counts=True)
        self._count = len(ids)
        self._places = dict(zip(ids.tolist(), range(len(ids)), strict=True))
        self._ids = np.concatenate([ids, np.zeros(_FIRST_ROOM, np.int64)])
        self._counts = np.concatenate([counts, np.zeros(_FIRST_ROOM)]).astype(np.float32)

    @property
    def ids(self) -> Ids:
        return self._ids[: self._count]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self._count]

    def among(self, of: Ids | None) -> tuple[Ids, Ids | slice]:
        """Where in `of` [n] they are, or in the vocabulary, and which of `ids` those are. Costs
        what `of` has, however many tokens there are."""
        if of is None:
            return self.ids, slice(None)
        places = np.fromiter(map(self._places.get, of.tolist(), repeat(-1)), np.int64, len(of))
        at = np.flatnonzero(places >= 0)
        return at, places[at]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, self._count)
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1
        self._count = len(self._places)


def _joined(ids: Iterable[Ids]) -> Ids:
    return np.concatenate([np.zeros(0, np.int64), *ids])
