"""The part of the store about devices that took a release after its waves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from remora_contract.device_phase import Phase
from remora_controller.domain import Assignment, RolloutRecord, StoredEvent
from remora_controller.late_gates import LateState
from remora_controller.rollout import Attempt


@dataclass(frozen=True)
class LateMember:
    """A device that is judged and serves the release, or has ended it, or was given another."""

    rollout_id: str
    device_id: str
    forward: Attempt
    newest_generation: int
    last_good: str | None
    is_barred: bool


@dataclass(frozen=True)
class LateFlag:
    device_id: str
    rollout_id: str
    state: LateState
    detail: str


class LateStore(Protocol):
    def late_members(self) -> list[LateMember]:
        """By rollout and device; removed devices are left out."""
        ...

    def late_standings(self, rollout_id: str) -> list[tuple[LateState, Phase | None, int]]:
        """How many of its late devices are in a state with a furthest phase."""
        ...

    def end_late(
        self, member: LateMember, state: LateState, detail: str, event: StoredEvent | None
    ) -> bool:
        """False when it has ended already: the first end stays."""
        ...

    def send_late_back(
        self,
        member: LateMember,
        rollout: RolloutRecord,
        release_id: str | None,
        detail: str,
        event: StoredEvent,
    ) -> Assignment | None:
        """Ends it and assigns the way back under the same rollout, at `event.at`. None when it
        ended already or was assigned something since."""
        ...

    def late_flags(self) -> list[LateFlag]:
        """Judged, or ended by failing or without evidence, where nothing was assigned since."""
        ...
