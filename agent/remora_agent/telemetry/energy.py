"""Joules and joules per token from power readings and token counts. Pure; the clock comes in.

E = sum over samples of (P[i-1] + P[i]) / 2 * (t[i] - t[i-1])        joules, trapezoids
joules per token = (E_now - E_then) / (tokens_now - tokens_then)
"""

from __future__ import annotations

from dataclasses import dataclass

# A longer hole between samples is not interpolated: nobody knows what happened in it.
MAX_GAP_S = 120.0


@dataclass(frozen=True)
class Energy:
    joules: float = 0.0
    watts: float | None = None
    at_s: float = 0.0

    def add(self, watts: float | None, now_s: float) -> Energy:
        """The meter after one more sample; None where power is not measured."""
        if watts is None:
            return Energy(self.joules, None, now_s)
        elapsed_s = now_s - self.at_s
        if self.watts is None or not 0 < elapsed_s <= MAX_GAP_S:
            return Energy(self.joules, watts, now_s)
        return Energy(self.joules + (self.watts + watts) / 2 * elapsed_s, watts, now_s)


def joules_per_token(joules: float, tokens: float) -> float | None:
    """None when no token was made in the window: idle power is nobody's."""
    return joules / tokens if tokens > 0 else None
