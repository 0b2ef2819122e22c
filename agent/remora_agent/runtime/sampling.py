"""From logits to a token. Pure but for the request's own random generator and the tokens it has
seen: what other rows do never changes a draw.

In the order of transformers' processors: bias and penalties (penalties.py), then tokens that may
not come are taken out, then

    p_i ∝ exp((logit_i - max) / temperature)

over the `top_k` largest (ties with the k-th stay), of which the smallest set of largest
probabilities whose sum reaches `top_p` is kept, of which those not below `min_p` times the largest;
then one uniform draw inverts the cumulative sum in the order of token ids. At temperature 0 the
largest logit is taken, the first of equals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Watch
from remora_agent.runtime.api import SamplingParams
from remora_agent.runtime.distribution import Ids, invert, kept
from remora_agent.runtime.penalties import Logits as Logits
from remora_agent.runtime.penalties import Penalties
from remora_agent.runtime.shortlist import Candidates, ShortRow, drawable, greedy, watch
from remora_contract.errors import EngineFault, RequestInvalid

Allowed = NDArray[np.bool_]


class Sampler:
    """Draws the tokens of one request, each of which becomes part of its answer. `seed` is used
    when the request names none."""

    def __init__(self, params: SamplingParams, seed: int, prompt: Sequence[int] = ()) -> None:
        self._params = params
        self._penalties = Penalties(params, prompt)
        self._scratch: Logits | None = None  # [vocab], kept: a new one each step is slow
        self._watch_nothing = watch(np.zeros(0, np.int64), params)
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
        token = best if self._params.temperature == 0 else self._sampled(logits)
        self._penalties.saw(token)
        return token

    def watch(self, banned: Ids | None = None) -> Watch:
        """What the next `pick` has to know beside the largest logits."""
        if banned is None and not self._penalties.active:
            return self._watch_nothing
        ids = self._penalties.ids
        return watch(ids if banned is None else np.concatenate([ids, banned]), self._params)

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
            token = self._picked(found, row, constrained=allowed is not None)
        if token is not None:
            self._penalties.saw(token)
        return token

    def _known(self, row: ShortRow, allowed: Allowed | None, banned: Ids | None) -> Candidates:
        ids, logits, _ = row.known
        values, most = logits.copy(), row.least
        if self._penalties.active:
            self._penalties.apply(values, ids)
        if banned is not None:
            values[np.searchsorted(ids, banned)] = -np.inf
        if allowed is not None:
            among = allowed[ids]
            values[~among] = -np.inf
            if np.count_nonzero(allowed) == np.count_nonzero(among):
                most = -np.inf
        return Candidates(ids, values, most, row.vocab)

    def _picked(self, found: Candidates, row: ShortRow, *, constrained: bool) -> int | None:
        def tail(best: float) -> tuple[float, float]:
            least, most = row.tail(best)
            return (0.0 if constrained else least), most

        draws = drawable(found, self._params, tail)
        return None if draws is None else self._drawn(*draws)

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

    def _sampled(self, logits: Logits) -> int:
        return self._drawn(*kept(logits, self._params))

    def _drawn(self, ids: Ids | None, weights: NDArray[np.float32]) -> int:
        at = invert(weights, self._random.random())
        return at if ids is None else int(ids[at])
