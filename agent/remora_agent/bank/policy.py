"""What may be resident: pure decisions over sizes, leases and pins.

Answers with what to evict, or why it cannot be. Touches no engine, disk or clock. Who has waited
so long that others give way is decided in `turns`, what is read from disk in `reading`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """What adapters take in the bank."""

    rank: int = 0  # columns
    bytes: int = 0  # at most, as float32

    def __add__(self, other: Size) -> Size:
        return Size(self.rank + other.rank, self.bytes + other.bytes)


# A request's adapters: digest -> size.
Sizes = Mapping[str, Size]


@dataclass(frozen=True)
class BankLimits:
    """Of all resident adapters together."""

    rank: int
    bytes: int | None = None  # None: bounded by rank alone

    def hold(self, size: Size) -> bool:
        return size.rank <= self.rank and (self.bytes is None or size.bytes <= self.bytes)


@dataclass(frozen=True)
class Place:
    """A resident adapter."""

    digest: str
    size: Size
    leases: int  # running requests that use it
    pinned: bool
    draining: bool  # unloaded by its operator: leaves at its last release, takes no new lease
    used: int  # grows with every lease: the smallest is the least recently used
    since_s: float  # when it became resident

    @property
    def idle(self) -> bool:
        """Nobody holds it and it may leave."""
        return self.leases == 0 and not self.pinned


@dataclass(frozen=True)
class Fits:
    evict: tuple[str, ...] = ()  # first these leave


@dataclass(frozen=True)
class NoRoom:
    """Waiting may help: what is in the way is leased, pinned or kept for others."""


@dataclass(frozen=True)
class BankCapacity:
    """`more_adapters` of the asked rank, on every projection, could be resident beside what is
    leased or pinned."""

    limits: BankLimits
    used: Size
    evictable_rank: int
    more_adapters: int
    host_max_bytes: int
    host_used_bytes: int


def total(sizes: Iterable[Size]) -> Size:
    return sum(sizes, Size())


def make_room(
    places: Sequence[Place],
    wanted: Sizes,
    limits: BankLimits,
    leaving: Sequence[Place],
    kept: Size | None = None,
) -> Fits | NoRoom:
    """How all of `wanted` get resident together, `kept` staying free besides.

    Evicts of `leaving`, the first of them first, no more than needed; never what is wanted.
    """
    resident = {p.digest for p in places}
    need = total(size for digest, size in wanted.items() if digest not in resident)
    candidates = [p for p in leaving if p.digest not in wanted]
    gone = {p.digest for p in candidates}
    taken = total(p.size for p in places if p.digest not in gone) + need + (kept or Size())
    if not limits.hold(taken):
        return NoRoom()
    # From the last one on, keep whatever the need leaves room for.
    evict = []
    for place in reversed(candidates):
        if limits.hold(taken + place.size):
            taken += place.size
        else:
            evict.append(place.digest)
    return Fits(tuple(reversed(evict)))


def least_recently_used(places: Iterable[Place], besides: Collection[str] = ()) -> list[Place]:
    """The idle ones, in the order in which they leave; without `besides`."""
    idle = (p for p in places if p.idle and p.digest not in besides)
    return sorted(idle, key=lambda p: p.used)


def never_fits(pinned: Sizes, wanted: Sizes, limits: BankLimits) -> Size | None:
    """What pinned and wanted take together, when that is too much; else None."""
    together = total({**pinned, **wanted}.values())
    return None if limits.hold(together) else together


def more_that_fit(places: Sequence[Place], limits: BankLimits, one: Size) -> int:
    """How many more of `one`, whose rank is at least 1, beside what is leased or pinned."""
    fixed = total(p.size for p in places if not p.idle)
    by_rank = (limits.rank - fixed.rank) // one.rank
    if limits.bytes is None or not one.bytes:
        return max(0, by_rank)
    return max(0, min(by_rank, (limits.bytes - fixed.bytes) // one.bytes))
