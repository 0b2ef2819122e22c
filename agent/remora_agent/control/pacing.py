"""How fast and how often: full-jitter backoff, a bandwidth cap. Time and randomness come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Backoff:
    """Full jitter: the delay after failure n (from 0) is uniform in [0, min(cap, base * 2**n)]."""

    base_s: float = 0.5
    cap_s: float = 60.0

    def delay_s(self, failures: int, random_unit: float) -> float:
        """`random_unit` is uniform in [0, 1)."""
        return random_unit * min(self.cap_s, self.base_s * 2.0 ** min(failures, 32))


_BURST_S, _SHARED_BURST_S = 1.0, 0.25
_LEAST_PORTION_BYTES = 4096


class RateLimit:
    """A token bucket: `delay_s` says how long to wait for `count` more bytes so that the average
    stays below the cap. Idle time earns a second's worth of them, less where others share the cap:
    all their bursts may come at once."""

    def __init__(self, bytes_per_s: int | None, now_s: float) -> None:
        self._own = self._rate = bytes_per_s
        # What others leave, which changes while bytes come; 0: nothing just now.
        self.shared: Callable[[], int | None] = lambda: None
        self._free_at_s = now_s  # when the bytes let through so far are paid for

    def cap(self, bytes_per_s: int | None) -> None:
        """From now on no faster than this either."""
        rates = [r for r in (self._own, bytes_per_s) if r is not None]
        self._rate = min(rates, default=None)

    def delay_s(self, count: int, now_s: float) -> float:
        shared, rate = self.shared(), self._least()
        if rate is None:
            return 0.0
        burst_s = _BURST_S if shared is None else _SHARED_BURST_S
        self._free_at_s = max(self._free_at_s, now_s - burst_s) + count / rate
        return max(0.0, self._free_at_s - now_s)

    def portion(self, count: int) -> int:
        """How many of `count` bytes to ask for at once: what the cap lets through in a second."""
        rate = self._least()
        return count if rate is None else min(count, max(_LEAST_PORTION_BYTES, rate))

    def _least(self) -> int | None:
        return min((r for r in (self._rate, self.shared() or None) if r is not None), default=None)
