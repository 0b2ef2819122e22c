"""How fast and how often: full-jitter backoff, a bandwidth cap. Time and randomness come in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Full jitter: the delay after failure n (from 0) is uniform in [0, min(cap, base * 2**n)]."""

    base_s: float = 0.5
    cap_s: float = 60.0

    def delay_s(self, failures: int, random_unit: float) -> float:
        """`random_unit` is uniform in [0, 1)."""
        return random_unit * min(self.cap_s, self.base_s * 2.0 ** min(failures, 32))


class RateLimit:
    """A token bucket of one second's worth of bytes: `delay_s` says how long to wait after `count`
    more bytes so that the average stays below the cap."""

    def __init__(self, bytes_per_s: int | None, now_s: float) -> None:
        self._own = self._rate = bytes_per_s
        self._free_at_s = now_s  # when the bytes let through so far are paid for

    def cap(self, bytes_per_s: int | None) -> None:
        """From now on no faster than this either."""
        rates = [r for r in (self._own, bytes_per_s) if r is not None]
        self._rate = min(rates, default=None)

    def delay_s(self, count: int, now_s: float) -> float:
        if self._rate is None:
            return 0.0
        # Idle time earns at most one second of burst.
        self._free_at_s = max(self._free_at_s, now_s - 1.0) + count / self._rate
        return max(0.0, self._free_at_s - now_s)
