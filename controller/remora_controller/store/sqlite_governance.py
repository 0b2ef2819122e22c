"""Groups, pins, quarantine by hand, approvals and the audit log, in SQLite."""

from __future__ import annotations

import json
from collections.abc import Iterator

from remora_controller.audit import AuditDraft, AuditEntry, AuditHead, chained
from remora_controller.domain import RolloutRecord, RolloutState, StoredEvent
from remora_controller.groups import Group
from remora_controller.store.base import SqliteBase
from remora_controller.store.rows import Row, dumps

_PAGE = 1000


class SqliteGovernance(SqliteBase):
    def groups(self) -> dict[str, Group]:
        rows = self._rows("SELECT * FROM device_groups ORDER BY name")
        return {row["name"]: _group_of(row) for row in rows}

    def save_group(self, group: Group) -> None:
        row = {
            **vars(group),
            "device_ids": None if group.device_ids is None else dumps(group.device_ids),
        }
        with self._atomic():
            self._write("DELETE FROM device_groups WHERE name = ?", group.name)
            self._insert("device_groups", row)

    def delete_group(self, name: str) -> None:
        with self._atomic():
            self._write("DELETE FROM device_groups WHERE name = ?", name)

    def set_pin(self, device_id: str, pin: str | None) -> None:
        with self._atomic():
            self._write("UPDATE devices SET pin = ? WHERE device_id = ?", pin, device_id)

    def quarantine_by(self, device_id: str, by: str, reason: str, at: float) -> None:
        sql = "UPDATE devices SET quarantine = ?, quarantined_by = ? WHERE device_id = ?"
        with self._atomic():
            self._write(sql, reason, by, device_id)
            self._tell(at, device_id, "device.quarantined", {"reason": reason, "by": by})

    def lift_quarantine(self, device_id: str, at: float) -> None:
        sql = "UPDATE devices SET quarantine = NULL, quarantined_by = '' WHERE device_id = ?"
        with self._atomic():
            self._write(sql, device_id)
            self._tell(at, device_id, "device.quarantine_lifted", {})

    def _tell(self, at: float, device_id: str, name: str, detail: dict[str, str]) -> None:
        row = {"at": at, "device_id": device_id, "name": name, "detail_json": dumps(detail)}
        self._insert("events", row)

    def approve(self, rollout: RolloutRecord, by: str, now: float) -> bool:
        sql = (
            "UPDATE rollouts SET version = version + 1, state = ?, reason = ?, clock_at = ?,"
            " approved_by = ? WHERE rollout_id = ? AND version = ?"
        )
        with self._atomic():
            state, reason = RolloutState.RUNNING.value, f"approved by {by}"
            key = (rollout.rollout_id, rollout.version)
            return self._write(sql, state, reason, now, by, *key) == 1

    def rollout_events(self, rollout_id: str, limit: int) -> list[StoredEvent]:
        sql = (
            "SELECT at, device_id, name, detail_json FROM events WHERE device_id = ''"
            " AND json_extract(detail_json, '$.rollout') = ? ORDER BY id LIMIT ?"
        )
        return [StoredEvent(**row) for row in self._rows(sql, rollout_id, limit)]

    def append_audit(self, draft: AuditDraft) -> AuditEntry:
        with self._atomic():
            # Writes first: from here on no other process can, and what is read is the newest.
            self._write("UPDATE audit_head SET seq = seq WHERE id = 1")
            entry = chained(draft, self.audit_head())
            self._insert("audit", _audit_row(entry))
            head = "UPDATE audit_head SET seq = ?, hash = ? WHERE id = 1"
            self._write(head, entry.seq, entry.hash)
            return entry

    def audit(self, since: float, after_seq: int, limit: int) -> list[AuditEntry]:
        sql = "SELECT * FROM audit WHERE at >= ? AND seq > ? ORDER BY seq LIMIT ?"
        return [_audit_of(row) for row in self._rows(sql, since, after_seq, limit)]

    def audit_head(self) -> AuditHead:
        row = self._row("SELECT seq, hash FROM audit_head WHERE id = 1")
        return AuditHead(0, "") if row is None else AuditHead(row["seq"], row["hash"])

    def audit_entries(self) -> Iterator[AuditEntry]:
        last = 0
        while page := self.audit(0.0, last, _PAGE):
            yield from page
            last = page[-1].seq

    def revoke_operator(self, name: str, at: float) -> bool:
        with self._atomic():
            sql = "INSERT OR IGNORE INTO revoked_operators (name, at) VALUES (?, ?)"
            return self._write(sql, name, at) == 1

    def is_revoked(self, name: str) -> bool:
        return self._row("SELECT name FROM revoked_operators WHERE name = ?", name) is not None


def _group_of(row: Row) -> Group:
    listed = row["device_ids"]
    return Group(**{**row, "device_ids": None if listed is None else tuple(json.loads(listed))})


def _audit_row(entry: AuditEntry) -> Row:
    row = {**vars(entry.draft), "seq": entry.seq, "hash": entry.hash}
    row["place"] = row.pop("where")  # a word of SQL
    row["answers"] = entry.draft.answers or 0
    return row


def _audit_of(row: Row) -> AuditEntry:
    seq, hash_ = row.pop("seq"), row.pop("hash")
    row["where"] = row.pop("place")
    row["answers"] = row["answers"] or None
    return AuditEntry(AuditDraft(**row), seq, hash_)
