"""One identity on two machines, told from one machine that starts again. Pure.

Each agent process draws a boot id and counts its Syncs. A count that goes backwards, or a boot id
that returns after another one spoke, can only come from a second machine (or a restored copy).
"""

from __future__ import annotations

from dataclasses import dataclass

from remora_controller.domain import BootTrail

REMEMBERED_BOOTS = 16


@dataclass(frozen=True)
class Follows:
    """The call continues the trail."""

    trail: BootTrail


@dataclass(frozen=True)
class CloneFound:
    reason: str


def follow(trail: BootTrail, boot_id: str, seq: int) -> Follows | CloneFound:
    """A repeated (boot_id, seq) is the same call sent again and changes nothing."""
    if boot_id in trail.earlier:
        return CloneFound(f"boot {boot_id[:12]} spoke again after boot {trail.boot_id[:12]}")
    if not trail.boot_id:
        return Follows(BootTrail(boot_id, seq))
    if boot_id != trail.boot_id:
        earlier = (trail.boot_id, *trail.earlier)[:REMEMBERED_BOOTS]
        return Follows(BootTrail(boot_id, seq, earlier))
    if seq < trail.seq:
        return CloneFound(f"call {seq} of boot {boot_id[:12]} came after call {trail.seq}")
    return Follows(BootTrail(boot_id, seq, trail.earlier))
