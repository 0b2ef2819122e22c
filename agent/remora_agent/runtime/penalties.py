"""What a request adds to its logits before a token is drawn. Pure but for the tokens it has seen.

In this order, as transformers and vLLM apply them:

    logit += bias[token]                                          logit_bias
    logit  = logit / r if logit >= 0 else logit * r               repetition_penalty r, of every
                                                                  token in prompt or answer
    logit -= frequency * count[token] + presence                  of every token in the answer

Only entries of tokens concerned are touched: a step costs what was seen, not the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import SamplingParams

Logits = NDArray[np.float32]
_FIRST_ROOM = 64


class Penalties:
    """Of one request. Token ids are within the vocabulary, checked before."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        pairs = params.logit_bias
        self._biased = np.array([token for token, _ in pairs], np.int64)
        self._bias = np.array([value for _, value in pairs], np.float32)
        self._repetition = np.float32(params.repetition_penalty)
        self._presence = np.float32(params.presence_penalty)
        self._frequency = np.float32(params.frequency_penalty)
        repeats, counts = params.repetition_penalty != 1, self._presence or self._frequency
        self._seen = _Tokens(prompt) if repeats else None
        self._answered = _Tokens(()) if counts else None
        self.active = bool(pairs or repeats or counts)

    @property
    def ids(self) -> NDArray[np.int64]:
        """Tokens whose logits `apply` changes; some more than once."""
        tokens = [t.ids for t in (self._seen, self._answered) if t is not None]
        return np.concatenate([self._biased, *tokens])

    def apply(self, logits: Logits, of: NDArray[np.int64] | None = None) -> None:
        """Changes logits in place: [vocab], or those of the tokens `of` [n], ascending, which hold
        all `ids`."""

        def places(ids: NDArray[np.int64]) -> NDArray[np.int64]:
            return ids if of is None else np.searchsorted(of, ids)

        if len(self._biased):
            logits[places(self._biased)] += self._bias
        if self._seen is not None:
            at = places(self._seen.ids)
            found = logits[at]
            logits[at] = np.where(found < 0, found * self._repetition, found / self._repetition)
        if self._answered is not None:
            counts = self._answered.counts
            logits[places(self._answered.ids)] -= self._frequency * counts + self._presence

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
    def ids(self) -> NDArray[np.int64]:
        return self._ids[: self._count]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: self._count]

    def add(self, token: int) -> None:
        place = self._places.setdefault(token, self._count)
        if place == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[place] = token
        self._counts[place] += 1
        self._count = len(self._places)
