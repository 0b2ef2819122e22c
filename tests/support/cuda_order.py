"""Which queued work may run at the same time, and whether it touches the same memory: what CUDA
leaves undefined. Streams order their own work, events order streams, waiting orders the host.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

Range = tuple[int, int]  # address, bytes
Clock = dict[int, int]  # stream -> work of it that has ended, as far as is known


@dataclass(frozen=True)
class Touches:
    """What an operation reads and writes. A thing that only one may use at a time is written."""

    reads: tuple[Range, ...] = ()
    writes: tuple[Range, ...] = ()
    what: str = ""


@dataclass(frozen=True)
class _Queued:
    stream: int
    number: int
    touches: Touches


@dataclass
class Order:
    """AssertionError for two operations that nothing orders and of which one writes what the other
    touches."""

    _clocks: dict[int, Clock] = field(default_factory=dict)
    _events: dict[int, Clock] = field(default_factory=dict)
    _host: Clock = field(default_factory=dict)
    _open: list[_Queued] = field(default_factory=list)
    strict: bool = True
    overlapped: int = 0  # pairs of operations that may have run at the same time

    def queued(self, stream: int, touches: Touches) -> None:
        clock = self._clock(stream)
        _merge(clock, self._host)
        clock[stream] = clock.get(stream, 0) + 1
        new = _Queued(stream, clock[stream], touches)
        for old in self._open:
            if old.number > clock.get(old.stream, 0):
                self.overlapped += 1
                if self.strict:
                    _check(old.touches, touches)
        self._open.append(new)

    def recorded(self, event: int, stream: int) -> None:
        self._events[event] = dict(self._clock(stream))

    def waits(self, stream: int, event: int) -> None:
        _merge(self._clock(stream), self._events.get(event, {}))

    def host_waited(self, stream: int) -> None:
        self._ended(self._clock(stream))

    def host_saw(self, event: int) -> None:
        """The event was found to have happened."""
        self._ended(self._events.get(event, {}))

    def _ended(self, clock: Clock) -> None:
        _merge(self._host, clock)
        self._open = [q for q in self._open if q.number > self._host.get(q.stream, 0)]

    def _clock(self, stream: int) -> Clock:
        return self._clocks.setdefault(stream, {})


def _merge(into: Clock, other: Clock) -> None:
    for stream, number in other.items():
        into[stream] = max(into.get(stream, 0), number)


def _check(old: Touches, new: Touches) -> None:
    pairs = (
        (old.writes, new.writes, "both write"),
        (old.writes, new.reads, "one writes and the other reads"),
        (old.reads, new.writes, "one reads and the other writes"),
    )
    for first, second, how in pairs:
        shared = _shared(first, second)
        assert shared is None, (
            f"{old.what} and {new.what} may run at the same time and {how} {shared:#x}"
        )


def _shared(first: Iterable[Range], second: Iterable[Range]) -> int | None:
    for a, size in first:
        for b, other in second:
            if a < b + other and b < a + size:
                return max(a, b)
    return None
