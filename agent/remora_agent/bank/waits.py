"""Which waiting requests the bank has refused room, and since when. Requests with the same adapters
are one. Knows no places: what follows from it is decided in `turns`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from remora_agent.bank.policy import Sizes
from remora_agent.bank.turns import Key


@dataclass(frozen=True)
class _Wait:
    wanted: Sizes
    since_s: float


class Waits:
    """At most as many as there are waiting requests. One thread uses it."""

    def __init__(self) -> None:
        self._waits: dict[Key, _Wait] = {}  # the longest first

    def refused(self, wanted: Sizes, now: float) -> None:
        """A request was refused room; counts from the first time."""
        self._waits.setdefault(frozenset(wanted), _Wait(wanted, now))

    def served(self, wanted: Collection[str]) -> None:
        self._waits.pop(frozenset(wanted), None)

    def keep(self, waiting: Collection[Key]) -> None:
        """Forgets those that no request waits for any more."""
        for key in [k for k in self._waits if k not in waiting]:
            del self._waits[key]

    def longer_than(self, now: float, seconds: float) -> tuple[Sizes, ...]:
        """What was refused at least `seconds` ago, the longest first."""
        return tuple(w.wanted for w in self._waits.values() if now - w.since_s >= seconds)
