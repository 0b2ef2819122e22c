"""Who gets room in the bank at this moment. Remembers who waits and what was decided; the decisions
are `turns`', carrying them out is the bank's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from remora_agent.bank.policy import BankLimits, Fits, NoRoom, Place, Sizes
from remora_agent.bank.turns import Demand, Key, Turns, newcomer_room, plan_turns
from remora_agent.bank.waits import Waits


class Admission:
    """One thread uses it. `places` are the residents now, `ready` says whether adapters are
    resident or in host memory, `gave_way` hears how many adapters have to leave that are in use."""

    def __init__(
        self,
        limits: BankLimits,
        turn_s: float,
        clock: Callable[[], float],
        places: Callable[[], tuple[Place, ...]],
        ready: Callable[[Iterable[str]], bool],
        gave_way: Callable[[int], None],
    ) -> None:
        self._limits = limits
        self._turn_s = turn_s
        self._clock = clock
        self._places = places
        self._ready = ready
        self._gave_way = gave_way
        self._waits = Waits()
        self._asked: frozenset[str] = frozenset()
        self._turns = Turns()
        self._no_room: set[Key] = set()  # since the last change
        self._stale = False  # whether turns are to be decided anew

    def changed(self) -> None:
        """Places, leases or what can be loaded are not what they were, or time has passed."""
        self._stale = True

    def hear(self, waiting: Collection[Key], residents: Collection[str]) -> None:
        """What requests wait for now; who waits no more is forgotten."""
        self._waits.keep(waiting)
        usable = (key for key in waiting if all(d in residents for d in key))
        self._asked = frozenset(digest for key in usable for digest in key)
        self.changed()

    def room(self, wanted: Sizes) -> Fits | NoRoom:
        """How a request's adapters get resident now."""
        turns, key = self._decided(), frozenset(wanted)
        if key in turns.rooms:
            return turns.rooms[key]
        if key & turns.giving_way or key in self._no_room:
            return NoRoom()
        places = self._places()
        if key <= {p.digest for p in places}:
            return Fits()
        room = newcomer_room(places, wanted, self._asked, self._limits, turns)
        if isinstance(room, NoRoom):
            self._no_room.add(key)
        return room

    def room_for_operator(self, wanted: Sizes) -> Fits | NoRoom:
        """The same for an operator's wish, to whom idle adapters give way though asked for."""
        return newcomer_room(self._places(), wanted, (), self._limits, self._decided())

    def refused(self, wanted: Sizes) -> None:
        """A request was told to wait for room."""
        self._waits.refused(wanted, self._clock())

    def served(self, wanted: Collection[str]) -> None:
        self._waits.served(wanted)

    def _decided(self) -> Turns:
        """Anew only after a change: many requests ask in one step."""
        if self._stale:
            now, places, before = self._clock(), self._places(), self._turns.giving_way
            waits = self._waits.longer_than(now, self._turn_s)
            overdue = tuple(sizes for sizes in waits if self._ready(sizes))
            demand = Demand(overdue, self._asked, before)
            self._turns = plan_turns(places, demand, self._limits, now, self._turn_s)
            anew = self._turns.giving_way - before
            forced = (p for p in places if p.digest in anew)
            self._gave_way(sum(bool(p.leases) or p.digest in self._asked for p in forced))
            self._no_room.clear()
            self._stale = False
        return self._turns
