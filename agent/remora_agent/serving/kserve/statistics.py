"""Counts and durations by model name and version, since the agent started. Loop-bound: one event
loop writes and reads them. Knows no wire format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from remora_agent.runtime.api import Timings
from remora_agent.serving.kserve.names import Target

MAX_COUNTED = 4096  # names and versions; all beyond are counted together
OTHER = ("(other)", "")
_NS = 1_000_000_000


@dataclass
class Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += max(ns, 0)


@dataclass
class Counts:
    """`success` and `fail` last from a request's arrival to its last response. `queue` and `infer`
    are the runtime's; `around` is the rest: parsing, tokenising and handing responses over."""

    last_ms: int = 0  # since the epoch, of the last success
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    infer: Duration = field(default_factory=Duration)
    around: Duration = field(default_factory=Duration)


@dataclass
class Measured:
    """What becomes known of a request on its way."""

    target: Target | None = None  # None: no model has this name, nothing is counted
    timings: Timings | None = None  # None: it has not ended well


class Statistics:
    """`clock_ns` and `wall_ns` in nanoseconds, monotonic and since the epoch."""

    def __init__(self, clock_ns: Callable[[], int], wall_ns: Callable[[], int]) -> None:
        self._clock_ns, self._wall_ns = clock_ns, wall_ns
        self._counts: dict[tuple[str, str], Counts] = {}

    @contextmanager
    def measuring(self) -> Iterator[Measured]:
        """Around one request, however it ends."""
        began, measured = self._clock_ns(), Measured()
        try:
            yield measured
        finally:
            if measured.target is not None:
                self._add(measured.target, measured.timings, self._clock_ns() - began)

    def of(self, name: str, version: str) -> Counts:
        return self._counts.get((name, version), Counts())

    def all(self) -> tuple[tuple[str, str, Counts], ...]:
        """In the order of their first request."""
        return tuple((name, version, counts) for (name, version), counts in self._counts.items())

    def _add(self, target: Target, timings: Timings | None, total_ns: int) -> None:
        key = (target.name, target.version)
        if key not in self._counts and len(self._counts) >= MAX_COUNTED:
            key = OTHER
        counts = self._counts.setdefault(key, Counts())
        if timings is None:
            counts.fail.add(total_ns)
            return
        queue_ns = int(timings.queue_s * _NS)
        infer_ns = int((timings.prefill_s + timings.decode_s) * _NS)
        counts.last_ms = self._wall_ns() // 1_000_000
        counts.success.add(total_ns)
        counts.queue.add(queue_ns)
        counts.infer.add(infer_ns)
        counts.around.add(total_ns - queue_ns - infer_ns)
