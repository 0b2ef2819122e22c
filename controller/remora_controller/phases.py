"""The device's phases as the controller counts them: an order in which reports accumulate.

Reports of one generation form a lattice: the furthest phase wins, so late, repeated and reordered
reports end the same. Knows nothing of what a device does in a phase.
"""

from __future__ import annotations

from remora_contract.device_phase import FINAL, Phase

# From REVERTING on behind COMMITTED: a crash loop can still take a device back. How a generation
# ended otherwise stays said, also when what served before it goes down later.
ORDER = (
    Phase.ASSIGNED,
    Phase.ADMITTED,
    Phase.STAGING,
    Phase.STAGED,
    Phase.BUILDING,
    Phase.BUILT,
    Phase.PROVING,
    Phase.WAIT_WINDOW,
    Phase.SWITCHING,
    Phase.SOAKING,
    Phase.COMMITTED,
    Phase.REVERTING,
    Phase.REVERTED,
    Phase.FAILED,
    Phase.REFUSED,
    Phase.UNASSIGNED,
)
_RANK = {phase: rank for rank, phase in enumerate(ORDER)}
UNSUCCESSFUL = FINAL - {Phase.COMMITTED, Phase.UNASSIGNED}


def furthest(known: Phase | None, reported: Phase) -> Phase:
    """The later of the two; commutative, associative, idempotent."""
    return reported if known is None or _RANK[reported] > _RANK[known] else known


def parse_phase(text: str) -> Phase | None:
    """None for "" (a device that was never assigned anything) and for names of a newer agent."""
    return Phase(text) if text in Phase.__members__ else None
