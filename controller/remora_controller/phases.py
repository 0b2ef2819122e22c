"""The device's phases as the controller needs them: an order in which reports accumulate.

Reports of one generation form a lattice: the furthest phase wins, so late, repeated and reordered
reports end the same. Knows nothing of what a device does in a phase.
"""

from __future__ import annotations

from enum import Enum


class Phase(Enum):
    ASSIGNED = "ASSIGNED"
    ADMITTED = "ADMITTED"
    STAGING = "STAGING"
    STAGED = "STAGED"
    BUILDING = "BUILDING"
    BUILT = "BUILT"
    PROVING = "PROVING"
    WAIT_WINDOW = "WAIT_WINDOW"
    SWITCHING = "SWITCHING"
    SOAKING = "SOAKING"
    COMMITTED = "COMMITTED"  # a crash loop can still take a device back from here
    REVERTING = "REVERTING"
    REVERTED = "REVERTED"
    FAILED = "FAILED"
    REFUSED = "REFUSED"


_RANK = {phase: rank for rank, phase in enumerate(Phase)}
UNSUCCESSFUL = frozenset({Phase.REVERTED, Phase.FAILED, Phase.REFUSED})
SETTLED = UNSUCCESSFUL | {Phase.COMMITTED}


def furthest(known: Phase | None, reported: Phase) -> Phase:
    """The later of the two; commutative, associative, idempotent."""
    return reported if known is None or _RANK[reported] > _RANK[known] else known


def parse_phase(text: str) -> Phase | None:
    """None for "" (a device that was never assigned anything) and for names of a newer agent."""
    return Phase(text) if text in Phase.__members__ else None
