"""How far apart two ways of computing the same logits are, and whether one may stand for the other.

Pure. Used where a build may choose a faster numeric form: it is taken only when this says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A bundle's int4 weights move its distributions further than this from the checkpoint's.
MOST_KL = 0.05  # nats, mean over positions
MOST_SHIFT = 0.5  # of a logit, in spreads: what the golden probe grants int8 activations
LEAST_POSITIONS = 4


@dataclass(frozen=True)
class Agreement:
    """Of `positions` pairs of logits [vocab]."""

    positions: int
    same_top: float  # share of positions with the same most likely token
    mean_kl: float  # nats, of the plain form's distribution against the other's
    worst_shift: float  # root mean square of a position's differences, in spreads of its logits
    worst_lead: float  # how far the plain form's token fell behind another one, in spreads

    def summary(self) -> str:
        return (
            f"{self.positions} positions: same top token {self.same_top:.0%}, mean KL "
            f"{self.mean_kl:.4f}, worst shift {self.worst_shift:.3f}, worst lead "
            f"{self.worst_lead:.3f} spreads"
        )


def compare(plain: NDArray[np.float32], other: NDArray[np.float32]) -> Agreement:
    """Of logits [positions, vocab] for the same tokens. What is not finite is infinitely far."""
    if not len(plain):
        return Agreement(0, 0.0, 0.0, 0.0, 0.0)
    if not (np.isfinite(plain).all() and np.isfinite(other).all()):
        return Agreement(len(plain), 0.0, np.inf, np.inf, np.inf)
    spread = plain.std(axis=1)
    spread[spread == 0] = 1.0
    top, rows = plain.argmax(axis=1), np.arange(len(plain))
    # A shift common to all logits changes no probability.
    difference = (other - plain) - (other - plain).mean(axis=1, keepdims=True)
    shift = np.sqrt((difference**2).mean(axis=1)) / spread
    lead = (other.max(axis=1) - other[rows, top]) / spread
    p, q = _log_softmax(plain), _log_softmax(other)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    return Agreement(
        len(plain),
        float((other.argmax(axis=1) == top).mean()),
        float(kl.mean()),
        float(shift.max()),
        float(lead.max()),
    )


def objections(found: Agreement) -> list[str]:
    """Why the other form may not stand for the plain one; empty when it may."""
    wrong = []
    if found.positions < LEAST_POSITIONS:
        wrong.append(f"only {found.positions} positions could be compared")
    if not found.mean_kl <= MOST_KL:
        wrong.append(f"mean KL {found.mean_kl:.4f} is over {MOST_KL}")
    if not found.worst_shift <= MOST_SHIFT:
        wrong.append(f"logits move by {found.worst_shift:.3f} spreads, over {MOST_SHIFT}")
    if not found.worst_lead <= 2 * MOST_SHIFT:
        wrong.append(f"a token wins by {found.worst_lead:.3f} spreads, over {2 * MOST_SHIFT}")
    return wrong


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
