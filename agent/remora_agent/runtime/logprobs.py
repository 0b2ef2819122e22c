"""How likely the model found a token. Pure.

    logprob_i = logit_i - log sum_j exp(logit_j)

of the engine's logits as they are: before bias, penalties, constraint, temperature and filters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import TokenLogprob
from remora_agent.runtime.distribution import largest


def scored(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """The token's logprob and those of the `top` likeliest, likeliest first, of equals the lowest
    id first. Logits [vocab] are finite or -inf, one at least finite."""
    most = logits.max()
    total = float(most) + float(np.log(np.exp(logits - most).sum()))
    ranked = _ranked(logits, min(top, len(logits))) if top else ()
    return TokenLogprob(
        token,
        float(logits[token]) - total,
        tuple((int(i), float(logits[i]) - total) for i in ranked),
    )


def _ranked(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    ids = largest(logits, count)  # ascending, more than `count` where the last are equal
    return ids[np.argsort(-logits[ids], kind="stable")][:count]
