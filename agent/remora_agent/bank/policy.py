"""What may be resident: pure decisions over ranks, leases, pins and bytes.

Answers with what to evict or load, or why it cannot be. Touches no engine, disk or clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A resident adapter."""

    digest: str
    rank: int
    bytes: int
    leases: int  # running requests that use it
    pinned: bool
    draining: bool  # leaves at its last release, takes no new lease
    used: int  # grows with every lease: the smallest is the least recently used

    @property
    def evictable(self) -> bool:
        return self.leases == 0 and not self.pinned


@dataclass(frozen=True)
class Fits:
    evict: tuple[str, ...] = ()  # first these leave


@dataclass(frozen=True)
class NoRoom:
    """Waiting may help: what is in the way is leased or pinned."""

    need: int
    available: int  # free rank and rank that could be evicted


@dataclass(frozen=True)
class BankCapacity:
    max_rank: int
    used_rank: int
    evictable_rank: int
    more_adapters: int  # of the asked rank, evicting what no request uses


def make_room(places: Sequence[Place], wanted: Mapping[str, int], max_rank: int) -> Fits | NoRoom:
    """How all of `wanted` (digest -> rank) get resident together.

    Evicts the least recently used, no more than needed; never what is leased, pinned or wanted.
    """
    resident = {p.digest for p in places}
    need = sum(rank for digest, rank in wanted.items() if digest not in resident)
    free = max_rank - sum(p.rank for p in places)
    candidates = sorted(
        (p for p in places if p.evictable and p.digest not in wanted), key=lambda p: p.used
    )
    available = free + sum(p.rank for p in candidates)
    if need > available:
        return NoRoom(need, available)
    # From the most recently used on, keep whatever the need leaves room for.
    evict = []
    for place in reversed(candidates):
        if available - place.rank >= need:
            available -= place.rank
        else:
            evict.append(place.digest)
    return Fits(tuple(reversed(evict)))


def never_fits(pinned: Mapping[str, int], wanted: Mapping[str, int], max_rank: int) -> int | None:
    """The rank that pinned and wanted take together, when that is too much; else None."""
    together = sum({**pinned, **wanted}.values())
    return together if together > max_rank else None


def capacity(places: Sequence[Place], max_rank: int, rank: int) -> BankCapacity:
    """How many more adapters of `rank` >= 1 could be resident beside what is leased or pinned."""
    used = sum(p.rank for p in places)
    evictable = sum(p.rank for p in places if p.evictable)
    return BankCapacity(max_rank, used, evictable, max(0, max_rank - used + evictable) // rank)


def plan_loads(
    mixes: Iterable[Mapping[str, int]],
    resident: Collection[str],
    in_host: Collection[str],
    host_bytes: int,
) -> tuple[tuple[str, ...], frozenset[str]]:
    """What to read from disk, in order, and what host memory must not drop meanwhile.

    `mixes` are the waiting requests' adapters (digest -> bytes), oldest first. Requests are
    prepared as long as all they need fits host memory together, so that two of them cannot push
    out each other's weights for ever.
    """
    keep: dict[str, int] = {}
    for mix in mixes:
        more = {d: size for d, size in mix.items() if d not in resident}
        together = {**keep, **more}
        if sum(together.values()) > host_bytes:
            break
        keep = together
    return tuple(d for d in keep if d not in in_host), frozenset(keep)
