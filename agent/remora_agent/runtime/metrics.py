"""Counts and recent times of one runtime. Thread-safe; written once a step."""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Iterable, Mapping

WINDOW = 512  # recent observations behind each median


class RuntimeMetrics:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ttft_s: deque[float] = deque(maxlen=WINDOW)
        self._inter_token_s: deque[float] = deque(maxlen=WINDOW)
        self._steps: deque[tuple[int, float]] = deque(maxlen=WINDOW)  # tokens, engine seconds
        self._overhead_s: deque[float] = deque(maxlen=WINDOW)
        self.requests = 0
        self.failures = 0
        self.tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0

    def first_token(self, seconds: float) -> None:
        with self._lock:
            self._ttft_s.append(seconds)

    def step(self, tokens: int, engine_s: float, between_tokens_s: Iterable[float]) -> None:
        """One engine call that gave `tokens` tokens."""
        with self._lock:
            self.tokens += tokens
            self._steps.append((tokens, engine_s))
            self._inter_token_s.extend(between_tokens_s)

    def drafted(self, tokens: int, accepted: int) -> None:
        """So many tokens were guessed, and so many of them came true."""
        with self._lock:
            self.drafted_tokens += tokens
            self.accepted_tokens += accepted

    def forget_recent(self) -> None:
        """Observations begin anew, counts go on: something else answers from now on."""
        with self._lock:
            for recent in (self._ttft_s, self._inter_token_s, self._overhead_s):
                recent.clear()
            self._steps.clear()

    def overhead(self, seconds: float) -> None:
        """Of one step, outside the engine."""
        with self._lock:
            self._overhead_s.append(seconds)

    def ended(self, *, failed: bool) -> None:
        with self._lock:
            self.requests += 1
            self.failures += failed

    def values(self) -> Mapping[str, float]:
        """Times are medians over the last observations, in seconds; absent ones are 0."""
        with self._lock:
            engine_s = sum(seconds for _, seconds in self._steps)
            tokens = sum(count for count, _ in self._steps)
            return {
                "ttft_s": _median(self._ttft_s),
                "ttft_p95_s": _quantile(self._ttft_s, 0.95),
                "inter_token_s": _median(self._inter_token_s),
                "tokens_per_s": tokens / engine_s if engine_s else 0.0,
                "scheduler_step_s": _median(self._overhead_s),
                "requests": float(self.requests),
                "failures": float(self.failures),
                "tokens": float(self.tokens),
                "drafted_tokens": float(self.drafted_tokens),
                "accepted_tokens": float(self.accepted_tokens),
            }


def _median(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.median(values) if values else 0.0


def _quantile(values: Iterable[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else 0.0
