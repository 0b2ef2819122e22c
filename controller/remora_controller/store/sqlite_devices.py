"""Devices, join tokens and what Syncs leave behind, in SQLite."""

from __future__ import annotations

from collections.abc import Sequence

from remora_contract.device_phase import Phase
from remora_contract.errors import Unauthenticated
from remora_controller.domain import Device, Sighting, SyncRecord
from remora_controller.phases import furthest, parse_phase
from remora_controller.store.base import SqliteBase
from remora_controller.store.protocol import JoinTokenRecord
from remora_controller.store.rows import Row, device_of, device_row, dumps, error_text

_SERVES = (Phase.SOAKING, Phase.COMMITTED)
_MAKE_ANOTHER = "make a new one with `remora devices token`"


class SqliteDevices(SqliteBase):
    def add_join_token(self, token: JoinTokenRecord) -> None:
        row = {**vars(token), "labels": dumps(token.labels), "used_by": None}
        with self._atomic():
            self._insert("join_tokens", row)

    def enrol(self, secret_sha256: str, device: Device, now: float) -> Device:
        with self._atomic():
            token = self._row("SELECT * FROM join_tokens WHERE secret_sha256 = ?", secret_sha256)
            if token is None:
                raise Unauthenticated(f"this controller knows no such join token; {_MAKE_ANOTHER}")
            if token["used_by"] is not None:
                return self._enrolled_again(token, device)
            if now >= token["expires_at"]:
                raise Unauthenticated(f"the join token has expired; {_MAKE_ANOTHER}")
            row = {**device_row(device), "operator_labels": token["labels"]}
            self._insert("devices", row)
            used = "UPDATE join_tokens SET used_by = ? WHERE secret_sha256 = ?"
            self._write(used, device.device_id, secret_sha256)
            return device_of(row)

    def _enrolled_again(self, token: Row, device: Device) -> Device:
        known = self.device(token["used_by"])
        same = known is not None and known.key_fingerprint == device.key_fingerprint
        if known is None or not same or known.removed_at is not None:
            raise Unauthenticated(f"the join token was used before; {_MAKE_ANOTHER}")
        return known

    def device(self, device_id: str) -> Device | None:
        row = self._row("SELECT * FROM devices WHERE device_id = ?", device_id)
        return device_of(row) if row else None

    def devices(self) -> list[Device]:
        rows = self._rows("SELECT * FROM devices WHERE removed_at IS NULL ORDER BY device_id")
        return [device_of(row) for row in rows]

    def standings(self) -> list[tuple[str, str | None]]:
        sql = (
            "SELECT device_id, CASE WHEN quarantine IS NOT NULL THEN 'quarantined' END AS standing"
            " FROM devices WHERE removed_at IS NULL"
        )
        return [(row["device_id"], row["standing"]) for row in self._rows(sql)]

    def set_operator_labels(self, device_id: str, labels: dict[str, str]) -> None:
        sql = "UPDATE devices SET operator_labels = ? WHERE device_id = ?"
        with self._atomic():
            self._write(sql, dumps(labels), device_id)

    def quarantine(self, device_id: str, reason: str, at: float) -> None:
        with self._atomic():
            sql = "UPDATE devices SET quarantine = ? WHERE device_id = ? AND quarantine IS NULL"
            if self._write(sql, reason, device_id):
                detail = {"reason": reason}
                self._insert("events", _event(at, device_id, "device.quarantined", dumps(detail)))

    def remove_device(self, device_id: str, at: float) -> None:
        with self._atomic():
            self._write("UPDATE devices SET removed_at = ? WHERE device_id = ?", at, device_id)
            self._write("DELETE FROM metrics_latest WHERE device_id = ?", device_id)
            self._write("DELETE FROM experiment_counts WHERE device_id = ?", device_id)
            self._insert("events", _event(at, device_id, "device.removed", "{}"))

    def record_syncs(self, records: Sequence[SyncRecord]) -> None:
        with self._atomic():
            for record in records:
                self._record_sync(record)

    def _record_sync(self, record: SyncRecord) -> None:
        known = self.device(record.device_id)
        if known is None:
            return
        fresh = [e for e in record.events if e.seq > known.events_up_to]
        events = [_event(e.at, record.device_id, e.name, e.detail_json) for e in fresh]
        for event in events:
            self._insert("events", event)
        up_to = max([known.events_up_to, *(e.seq for e in fresh)])
        self._record_phase(record)
        self._write(
            "UPDATE devices SET hostname = ?, facts = ?, device_labels = ?, report = ?,"
            " held = COALESCE(?, held), progress = ?, trail = ?, last_seen = ?, events_up_to = ?"
            " WHERE device_id = ?",
            record.facts.hostname,
            dumps(record.facts),
            dumps(dict(record.device_labels)),
            dumps(record.report),
            None if record.held is None else dumps(record.held),
            record.report.progress,
            dumps(record.trail),
            record.seen_at,
            up_to,
            record.device_id,
        )

    def _record_phase(self, record: SyncRecord) -> None:
        reported = parse_phase(record.report.phase)
        where = "WHERE device_id = ? AND generation = ?"
        key = (record.device_id, record.report.generation)
        row = self._row(f"SELECT phase FROM assignments {where}", *key)
        if reported is None or row is None:
            return
        known = Phase(row["phase"]) if row["phase"] else None
        phase = furthest(known, reported)
        if phase is not known:
            served_at = record.seen_at if phase in _SERVES else None
            sql = (
                "UPDATE assignments SET phase = ?, error = ?, served_at = COALESCE(served_at, ?)"
                f" {where}"
            )
            self._write(sql, phase.value, error_text(record.report), served_at, *key)

    def record_sightings(self, sightings: Sequence[Sighting]) -> None:
        rows = [(s.seen_at, dumps(s.trail), s.device_id) for s in sightings]
        with self._atomic():
            sql = "UPDATE devices SET last_seen = ?, trail = ? WHERE device_id = ?"
            self._write_many(sql, rows)


def _event(at: float, device_id: str, name: str, detail_json: str) -> Row:
    return {"at": at, "device_id": device_id, "name": name, "detail_json": detail_json}
