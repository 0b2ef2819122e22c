"""Which completed rollout a device missed. Pure.

A device that was offline, joined later, or was refused and repaired goes straight to the newest
completed release for its labels, without a wave: that release has been proven.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from remora_controller.domain import Assignment, Device, RolloutRecord
from remora_controller.selector import Selector


@dataclass(frozen=True)
class Completed:
    rollout: RolloutRecord
    selector: Selector


def missed_rollout(
    device: Device, newest: Assignment | None, completed: Sequence[Completed]
) -> RolloutRecord | None:
    """`completed` is newest first; the device is in no open rollout.

    Only the newest one that matches counts, and only if nothing was assigned to the device since:
    what an operator or a way back decided later stands.
    """
    for candidate in completed:
        if candidate.selector.matches(device.device_id, device.labels):
            return candidate.rollout if _is_missed(candidate.rollout, newest) else None
    return None


def _is_missed(rollout: RolloutRecord, newest: Assignment | None) -> bool:
    if newest is None:
        return True
    if newest.rollout_id == rollout.rollout_id:
        return False
    return rollout.finished_at is not None and newest.created_at < rollout.finished_at
