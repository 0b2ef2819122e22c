"""Distributions of what requests waited for, in fixed buckets, for /metrics.

They count from the start of the process, over switches of models. Thread-safe.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from dataclasses import dataclass

from remora_agent.telemetry.records import RequestRecord

# Seconds; of a token, a fast engine's 1 ms to a slow CPU's seconds; of a request, up to minutes.
TOKEN_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
REQUEST_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# Tokens of a prompt or an answer.
LENGTH_BOUNDS = (16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0, 65536.0, 262144.0)


@dataclass(frozen=True)
class HistogramReading:
    """`counts[i]` observations are at most `bounds[i]` and above the bound before; one more count
    at the end is of what is above all."""

    name: str
    help: str
    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float  # sum of all observations

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound as text, observations up to it), as Prometheus has them."""
        names = [*(f"{bound:g}" for bound in self.bounds), "+Inf"]
        sums, seen = [], 0
        for name, count in zip(names, self.counts, strict=True):
            seen += count
            sums.append((name, float(seen)))
        return sums


class _Histogram:
    def __init__(self, name: str, help_text: str, bounds: tuple[float, ...]) -> None:
        self.name, self.help, self.bounds = name, help_text, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def reading(self) -> HistogramReading:
        return HistogramReading(self.name, self.help, self.bounds, tuple(self.counts), self.total)


class ServingHistograms:
    """`observe` is a sink of request records, `gap` hears the time between tokens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        seconds, tokens = REQUEST_BOUNDS_S, LENGTH_BOUNDS
        self._ttft = _Histogram(
            "time_to_first_token_seconds", "From submission to the first token.", seconds
        )
        self._queue = _Histogram(
            "queue_seconds",
            "From submission until the request had a row and its adapters.",
            seconds,
        )
        self._prefill = _Histogram("prefill_seconds", "From its row to the first token.", seconds)
        self._request = _Histogram(
            "request_seconds", "From submission to the end, however it ended.", seconds
        )
        self._gaps = _Histogram(
            "inter_token_seconds", "Between two tokens of one answer.", TOKEN_BOUNDS_S
        )
        self._prompt = _Histogram("prompt_tokens", "Tokens of a prompt.", tokens)
        self._answer = _Histogram("answer_tokens", "Tokens of an answer.", tokens)

    def observe(self, record: RequestRecord) -> None:
        with self._lock:
            self._request.add(record.total_s)
            self._prompt.add(record.usage.prompt_tokens)
            self._answer.add(record.usage.completion_tokens)
            if record.timings is None or not record.usage.completion_tokens:
                return
            self._ttft.add(record.timings.time_to_first_token_s)
            self._queue.add(record.timings.queue_s)
            self._prefill.add(record.timings.prefill_s)

    def gap(self, seconds: float) -> None:
        with self._lock:
            self._gaps.add(seconds)

    def readings(self) -> list[HistogramReading]:
        with self._lock:
            every = (
                self._ttft,
                self._gaps,
                self._queue,
                self._prefill,
                self._request,
                self._prompt,
                self._answer,
            )
            return [histogram.reading() for histogram in every]
