"""More adapters wanted than fit: who gives way to whom, and when. Pure: times are arguments.

An adapter that requests can use as it is stays for its turn, so that they share one load. A request
that was refused room for `turn_s` is *overdue*: it gets the room of adapters that have been
resident for `turn_s`, the longest resident first. These *give way*: they take no new lease and
leave when their last request ends. While an overdue request waits nobody else takes the room it
will get. So every request is served after at most the turns of those before it, and an adapter is
loaded at most once a turn, however many requests alternate.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from remora_agent.bank.policy import (
    BankLimits,
    Fits,
    NoRoom,
    Place,
    Size,
    Sizes,
    least_recently_used,
    make_room,
    total,
)

Key = frozenset[str]  # the digests of a request's adapters


@dataclass(frozen=True)
class Demand:
    """What the waiting requests ask of the bank."""

    overdue: tuple[Sizes, ...] = ()  # refused room for too long, the longest first; can be loaded
    asked: frozenset[str] = frozenset()  # resident adapters of requests that need no others
    giving_way: frozenset[str] = frozenset()  # as decided before: they go on doing so


@dataclass(frozen=True)
class Turns:
    """Who gets in now and who gives way."""

    giving_way: frozenset[str] = frozenset()
    rooms: dict[Key, Fits] = field(default_factory=dict)  # of overdue requests that get in now
    promised: frozenset[str] = frozenset()  # adapters whose places others do not get
    kept: Size = field(default_factory=Size)  # room that overdue requests will take
    closed: bool = False  # all room is kept for an overdue request


def plan_turns(
    places: Sequence[Place], demand: Demand, limits: BankLimits, now: float, turn_s: float
) -> Turns:
    """Gives each overdue request, the longest waiting first, the room it is to have."""
    plan = Turns()
    for wanted in demand.overdue:
        following = _next(places, wanted, demand, limits, now - turn_s, plan)
        if following is None:
            return _closed(plan, wanted)
        plan = following
    return plan


def newcomer_room(
    places: Sequence[Place], wanted: Sizes, asked: Collection[str], limits: BankLimits, turns: Turns
) -> Fits | NoRoom:
    """Room for a request that is not overdue: what is free or idle, not asked for, not promised."""
    if turns.closed:
        return NoRoom()
    leaving = least_recently_used(places, besides={*asked, *turns.promised})
    room = make_room(_staying(places, turns), wanted, limits, leaving, turns.kept)
    return room if isinstance(room, Fits) and _now(places, wanted, room, limits) else NoRoom()


def _next(
    places: Sequence[Place],
    wanted: Sizes,
    demand: Demand,
    limits: BankLimits,
    turn_over_s: float,
    plan: Turns,
) -> Turns | None:
    """The plan with room for one more; None when there is none yet."""
    if plan.giving_way & wanted.keys():
        return None  # it comes back after the one for which it leaves
    leaving = sorted(
        (p for p in places if _may_leave(p, demand, turn_over_s) and p.digest not in plan.promised),
        key=lambda p: _order(p, demand),
    )
    staying = _staying(places, plan)
    room = make_room(staying, wanted, limits, leaving, plan.kept)
    if isinstance(room, NoRoom):
        return None
    return Turns(
        plan.giving_way | set(room.evict),
        {**plan.rooms, frozenset(wanted): room}
        if _now(places, wanted, room, limits)
        else plan.rooms,
        plan.promised | set(room.evict) | wanted.keys(),
        plan.kept + _missing(places, wanted),
    )


def _closed(plan: Turns, wanted: Sizes) -> Turns:
    """Until there is room for `wanted`, whatever becomes free is kept for it."""
    return Turns(plan.giving_way, plan.rooms, plan.promised | wanted.keys(), plan.kept, closed=True)


def _now(places: Sequence[Place], wanted: Sizes, room: Fits, limits: BankLimits) -> bool:
    """Whether it need not wait for requests to end: theirs, or of adapters promised to others."""
    gone = set(room.evict)
    idle = all(p.idle for p in places if p.digest in gone)
    left = total(p.size for p in places if p.digest not in gone)
    return idle and limits.hold(left + _missing(places, wanted))


def _missing(places: Sequence[Place], wanted: Sizes) -> Size:
    resident = {p.digest for p in places}
    return total(size for digest, size in wanted.items() if digest not in resident)


def _staying(places: Sequence[Place], plan: Turns) -> list[Place]:
    """Without what gives way: its room is counted in `kept` by whom it was promised to."""
    return [p for p in places if p.digest not in plan.giving_way]


def _may_leave(place: Place, demand: Demand, turn_over_s: float) -> bool:
    if place.pinned:
        return False
    if place.draining or (place.idle and place.digest not in demand.asked):
        return True
    return place.since_s <= turn_over_s or place.digest in demand.giving_way


def _order(place: Place, demand: Demand) -> tuple[int, float]:
    if place.idle and place.digest not in demand.asked:
        return 0, place.used
    leaves_anyway = place.draining or place.digest in demand.giving_way
    return (1 if leaves_anyway else 2), place.since_s
