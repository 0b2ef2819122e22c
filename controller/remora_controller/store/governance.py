"""The part of the store that governs: groups, pins, who may no longer, who did what."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from remora_controller.audit import AuditDraft, AuditEntry, AuditHead
from remora_controller.domain import RolloutRecord, StoredEvent
from remora_controller.groups import Group


class GovernanceStore(Protocol):
    def groups(self) -> dict[str, Group]:
        """All, by name."""
        ...

    def save_group(self, group: Group) -> None:
        """A new one, or in place of the one of that name."""
        ...

    def delete_group(self, name: str) -> None: ...

    def set_pin(self, device_id: str, pin: str | None) -> None: ...

    def quarantine_by(self, device_id: str, by: str, reason: str, at: float) -> None:
        """By an operator: unlike the controller's own, in place of a former reason."""
        ...

    def lift_quarantine(self, device_id: str, at: float) -> None: ...

    def approve(self, rollout: RolloutRecord, by: str, now: float) -> bool:
        """Begins it, if it is still at `rollout.version`."""
        ...

    def rollout_events(self, rollout_id: str, limit: int) -> list[StoredEvent]:
        """The controller's own about one rollout, oldest first."""
        ...

    def append_audit(self, draft: AuditDraft) -> AuditEntry:
        """Durable when it returns; also while another process appends."""
        ...

    def audit(self, since: float, after_seq: int, limit: int) -> list[AuditEntry]:
        """Oldest first."""
        ...

    def audit_head(self) -> AuditHead: ...

    def audit_entries(self) -> Iterator[AuditEntry]:
        """All of them, oldest first."""
        ...

    def revoke_operator(self, name: str, at: float) -> bool:
        """False when it was before."""
        ...

    def is_revoked(self, name: str) -> bool: ...
