"""From logits to a token. Pure but for the request's own random generator: what other rows do
never changes a draw.

    p_i ∝ exp((logit_i - max) / temperature)

over the `top_k` largest (ties with the k-th stay), of which the smallest set of largest
probabilities whose sum reaches `top_p` is kept; then one uniform draw inverts the cumulative sum
in the order of token ids.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import SamplingParams
from remora_contract.errors import EngineFault

Logits = NDArray[np.float32]
# Candidates looked at first for top_p; nearly always enough, and far cheaper than sorting all.
_FIRST_CANDIDATES = 512
_BLOCK = 64


class Sampler:
    """Draws the tokens of one request. `seed` is used when the request names none."""

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self._params = params
        self._random = np.random.Generator(
            np.random.PCG64(seed if params.seed is None else params.seed)
        )

    def draw(self, logits: Logits) -> int:
        """The next token from logits [vocab]. Raises EngineFault when they hold NaN or +inf."""
        best = int(logits.argmax())  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise EngineFault(f"the engine answered {logits[best]} as logit of token {best}")
        if self._params.temperature == 0:
            return best
        ids, weights = kept(logits, self._params)
        at = _invert(weights, self._random.random())
        return at if ids is None else int(ids[at])


def kept(
    logits: Logits, params: SamplingParams
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """Token ids that may be drawn, ascending (None: all), and their unnormalised weights.

    `params.temperature` is positive here and the logits are finite or -inf.
    """
    ids: NDArray[np.int64] | None = None
    if 0 < params.top_k < len(logits):
        ids = _largest(logits, params.top_k)
        logits = logits[ids]
    with np.errstate(over="ignore", under="ignore"):  # -inf and 0 are what is meant there
        weights = np.exp((logits - logits.max()) / np.float32(params.temperature))
    if params.top_p >= 1:
        return ids, weights
    nucleus = _nucleus(weights, params.top_p)
    return (nucleus if ids is None else ids[nucleus]), weights[nucleus]


def _invert(weights: NDArray[np.float32], uniform: float) -> int:
    """The index where the cumulative share passes `uniform` in [0, 1); never one of weight 0."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    at = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
    # The product may round up to the whole sum.
    return at if at < len(weights) else int(np.flatnonzero(weights)[-1])


def _nucleus(weights: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Indices, ascending, of the fewest largest weights whose share reaches `top_p`."""
    enough = top_p * float(weights.sum(dtype=np.float64))
    count = _FIRST_CANDIDATES
    while True:
        candidates = _largest(weights, count)
        ordered = candidates[np.argsort(-weights[candidates], kind="stable")]
        reached = np.cumsum(weights[ordered], dtype=np.float64) >= enough
        if reached.any():
            return np.sort(ordered[: int(reached.argmax()) + 1])
        if count >= len(weights):
            return np.sort(ordered)
        count *= 16


def _largest(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
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
