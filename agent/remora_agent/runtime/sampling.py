"""From logits to a token. Pure but for the request's own random generator and the tokens it has
seen: what other rows do never changes a draw.

In the order of transformers' processors: bias and penalties (penalties.py), then tokens that may
not come are taken out, then

    p_i ∝ exp((logit_i - max) / temperature)

over the `top_k` largest (ties with the k-th stay), of which the smallest set of largest
probabilities whose sum reaches `top_p` is kept, of which those not below `min_p` times the largest.
drawing.py draws one of them. At temperature 0 the largest logit is taken, the first of equals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Watch
from remora_agent.runtime.api import SamplingParams
from remora_agent.runtime.distribution import Ids, places_in
from remora_agent.runtime.drawing import HEAD, Uniforms, drawn
from remora_agent.runtime.penalties import Logits as Logits
from remora_agent.runtime.penalties import Penalties
from remora_agent.runtime.shortlist import Candidates, ShortRow, greedy, picked, watch
from remora_contract.errors import EngineFault, RequestInvalid

Allowed = NDArray[np.bool_]


class Sampler:
    """Draws the tokens of one request, each of which becomes part of its answer. `seed` is used
    when the request names none; `head` is that of drawing.py."""

    def __init__(
        self, params: SamplingParams, seed: int, prompt: Sequence[int] = (), head: int = HEAD
    ) -> None:
        self._head = head
        self._params = params
        self._penalties = Penalties(params, prompt)
        self._scratch: Logits | None = None  # [vocab], kept: a new one each step is slow
        self._watch_nothing = watch(np.zeros(0, np.int64), params)
        self._uniforms: Uniforms | None = None  # of the next token, once they are drawn
        self._random = np.random.Generator(
            np.random.PCG64(seed if params.seed is None else params.seed)
        )

    def draw(
        self,
        logits: Logits,
        allowed: Allowed | None = None,
        banned: NDArray[np.int64] | None = None,
    ) -> int:
        """The next token from logits [vocab], which stay as they are: one that is `allowed` [vocab]
        and not among the ids `banned`.

        Raises EngineFault when the logits hold NaN or +inf, RequestInvalid when none is left.
        """
        best = int(logits.argmax())  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise EngineFault(f"the engine answered {logits[best]} as logit of token {best}")
        if self._penalties.active or allowed is not None or banned is not None:
            logits = self._changed(logits, allowed, banned)
            best = int(logits.argmax())
        if self._params.temperature > 0:
            best = drawn(logits, self._params, self._numbers())
        return self._took(best)

    def watch(self, room: int) -> Watch:
        """What the next `pick` has to know beside the largest logits: tokens that a penalty or bias
        may raise. Those that one lowers change no more than the sum of what is not known, and are
        told too where that matters and there is `room` for so many."""
        if not self._penalties.active:
            return self._watch_nothing
        params, ids = self._params, self._penalties.raised
        if params.temperature > 0 and not 0 < params.top_k <= self._head:
            changed = self._penalties.ids
            ids = changed if len(changed) <= room else ids
        return watch(ids, params)

    def pick(
        self, row: ShortRow, allowed: Allowed | None = None, banned: Ids | None = None
    ) -> int | None:
        """The token that `draw` would return, of a row that watched what `watch` said. None, and
        nothing has happened, where only all logits say which."""
        if not row.sound:
            return None
        plain = allowed is None and banned is None and not self._penalties.active
        if plain and self._params.temperature == 0:
            return row.first()
        found = self._known(row, allowed, banned)
        if self._params.temperature == 0:
            token = greedy(found)
        else:
            token = picked(found, self._params, row.tail, self._numbers())
        return None if token is None else self._took(token)

    def _known(self, row: ShortRow, allowed: Allowed | None, banned: Ids | None) -> Candidates:
        ids, logits, _ = row.known
        values, most, lowered = logits.copy(), row.least, 0
        if self._penalties.active:
            lowered = self._penalties.apply(values, ids)
        if banned is not None:
            places = places_in(ids, banned)
            values[places] = -np.inf
            lowered += len(banned) - len(places)
        if allowed is not None:
            among = allowed[ids]
            values[~among] = -np.inf
            elsewhere = np.count_nonzero(allowed) - np.count_nonzero(among)
            lowered += row.vocab - len(ids) - elsewhere
            most = most if elsewhere else -np.inf
        return Candidates(ids, values, most, row.vocab, lowered)

    def _changed(
        self, logits: Logits, allowed: Allowed | None, banned: NDArray[np.int64] | None
    ) -> Logits:
        if self._scratch is None:
            self._scratch = np.empty_like(logits)
        changed = self._scratch
        np.copyto(changed, logits)
        self._penalties.apply(changed)
        if banned is not None:
            changed[banned] = -np.inf
        if allowed is not None:
            np.copyto(changed, -np.inf, where=~allowed)
        if changed.max() == -np.inf:
            raise RequestInvalid(
                "constraint, min_tokens and stop tokens together leave no token to go on with"
            )
        return changed

    def _numbers(self) -> Uniforms:
        """Those of the next token, the same until it is taken."""
        if self._uniforms is None:
            self._uniforms = self._random.random(self._head + 1)
        return self._uniforms

    def _took(self, token: int) -> int:
        self._uniforms = None
        self._penalties.saw(token)
        return token
