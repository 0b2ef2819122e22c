"""Releases, rollouts and assignments, in SQLite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from remora_contract.device_phase import FINAL, Phase
from remora_contract.errors import Conflict
from remora_controller.domain import (
    FINAL_STATES,
    Assignment,
    Member,
    ReleaseRecord,
    RolloutRecord,
    RolloutState,
)
from remora_controller.gates.evaluate import Series
from remora_controller.late_gates import LateState
from remora_controller.rollout import Action, AdvanceWave, Assign, Attempt
from remora_controller.store.base import SqliteBase
from remora_controller.store.protocol import MemberState
from remora_controller.store.rows import (
    Row,
    assignment_of,
    assignment_row,
    member_of,
    release_of,
    release_row,
    rollout_of,
    rollout_row,
    series_of,
    series_text,
)

_FINAL = ", ".join(f"'{s.value}'" for s in sorted(FINAL_STATES, key=lambda s: s.value))
_SHOWN_CONFLICTS = 5

# What the device `m` committed before it was given `m.generation`.
LAST_GOOD = """(SELECT g.release_id FROM assignments g
    WHERE g.device_id = m.device_id AND g.generation < m.generation AND g.phase = 'COMMITTED'
      AND g.release_id IS NOT NULL
    ORDER BY g.generation DESC LIMIT 1)"""
_MEMBER_STATES = f"""
SELECT m.*, d.hostname, d.device_labels, d.operator_labels, d.last_seen, d.progress,
  d.quarantine IS NOT NULL OR d.removed_at IS NOT NULL OR d.pin IS NOT NULL AS is_barred,
  f.created_at AS forward_at, f.phase AS forward_phase, f.release_id AS forward_release,
  f.served_at AS forward_served, b.served_at AS back_served,
  b.created_at AS back_at, b.phase AS back_phase, b.release_id AS back_release,
  COALESCE(json_extract(d.report, '$.hold'), '') AS hold,
  COALESCE(NULLIF(b.error, ''), f.error, '') AS error,
  {LAST_GOOD} AS last_good
FROM rollout_devices m
JOIN devices d ON d.device_id = m.device_id
LEFT JOIN assignments f ON f.device_id = m.device_id AND f.generation = m.generation
LEFT JOIN assignments b ON b.device_id = m.device_id AND b.generation = m.rollback_generation
WHERE m.rollout_id = ? ORDER BY m.wave, m.position
"""

# Who has not ended when its rollout completes (it waits for a window, or did not answer) takes the
# release without its wave.
_LEFT_OVER = f"""
UPDATE rollout_devices AS m SET late = 'JUDGING'
WHERE m.rollout_id = ? AND m.rollback_generation IS NULL AND EXISTS (
  SELECT 1 FROM assignments a WHERE a.device_id = m.device_id AND a.generation = m.generation
    AND (a.phase IS NULL OR a.phase NOT IN ({", ".join(f"'{p.value}'" for p in FINAL)})))
"""


class SqliteRollouts(SqliteBase):
    def assignment(self, device_id: str) -> Assignment | None:
        row = self._row(
            "SELECT * FROM assignments WHERE device_id = ? ORDER BY generation DESC LIMIT 1",
            device_id,
        )
        return assignment_of(row) if row else None

    def assignments(self) -> dict[str, Assignment]:
        rows = self._rows(
            "SELECT a.* FROM assignments a JOIN (SELECT device_id, MAX(generation) AS generation"
            " FROM assignments GROUP BY device_id) USING (device_id, generation)"
        )
        return {row["device_id"]: assignment_of(row) for row in rows}

    def assign_late(self, device_id: str, rollout: RolloutRecord, now: float) -> Assignment:
        with self._atomic():
            made = self._assign(Assign(device_id, rollout.release_id, False), rollout, now)
            self._write(
                "INSERT INTO rollout_devices"
                " (rollout_id, device_id, wave, position, generation, late)"
                " VALUES (?, ?, ?, 0, ?, 'JUDGING')"
                " ON CONFLICT (rollout_id, device_id) DO UPDATE SET"
                " generation = excluded.generation, rollback_generation = NULL,"
                " late = 'JUDGING', late_detail = ''",
                *(rollout.rollout_id, device_id, rollout.waves, made.generation),
            )
            return made

    def add_release(self, release: ReleaseRecord) -> ReleaseRecord:
        with self._atomic():
            sql = "SELECT * FROM releases WHERE release_id = ?"
            if row := self._row(sql, release.release_id):
                return release_of(row)
            self._insert("releases", release_row(release))
            return release

    def release(self, name_or_id: str) -> ReleaseRecord | None:
        row = self._row("SELECT * FROM releases WHERE release_id = ?", name_or_id) or self._row(
            "SELECT * FROM releases WHERE name = ? ORDER BY created_at DESC, rowid DESC LIMIT 1",
            name_or_id,
        )
        return release_of(row) if row else None

    def releases(self) -> list[ReleaseRecord]:
        rows = self._rows("SELECT * FROM releases ORDER BY created_at DESC, rowid DESC")
        return [release_of(row) for row in rows]

    def add_rollout(
        self, rollout: RolloutRecord, members: Sequence[Member], *, supersede: bool
    ) -> list[str]:
        with self._atomic():
            overlapping = self._overlapping({m.device_id for m in members})
            if overlapping and not supersede:
                raise Conflict(_overlap_message(overlapping))
            for other in overlapping:
                reason = f"superseded by {rollout.rollout_id}"
                self._set_state(other, RolloutState.SUPERSEDED, reason, rollout.created_at)
            self._insert("rollouts", rollout_row(rollout))
            self._write_many(
                "INSERT INTO rollout_devices (rollout_id, device_id, wave, bucket, position)"
                " VALUES (?, ?, ?, ?, ?)",
                [
                    (rollout.rollout_id, m.device_id, m.wave, m.bucket, i)
                    for i, m in enumerate(members)
                ],
            )
        return sorted(overlapping)

    def _overlapping(self, device_ids: set[str]) -> dict[str, list[str]]:
        """Open rollouts that hold one of the devices, with the devices."""
        rows = self._rows(
            "SELECT rollout_id, device_id FROM rollout_devices JOIN rollouts USING (rollout_id)"
            f" WHERE state NOT IN ({_FINAL}) ORDER BY device_id"
        )
        found: dict[str, list[str]] = {}
        for row in rows:
            if row["device_id"] in device_ids:
                found.setdefault(row["rollout_id"], []).append(row["device_id"])
        return found

    def rollout(self, rollout_id: str) -> RolloutRecord | None:
        row = self._row("SELECT * FROM rollouts WHERE rollout_id = ?", rollout_id)
        return rollout_of(row) if row else None

    def rollouts(self, limit: int = 100) -> list[RolloutRecord]:
        sql = "SELECT * FROM rollouts ORDER BY created_at DESC, rowid DESC LIMIT ?"
        return [rollout_of(row) for row in self._rows(sql, limit)]

    def open_rollouts(self) -> list[RolloutRecord]:
        sql = f"SELECT * FROM rollouts WHERE state NOT IN ({_FINAL}) ORDER BY created_at, rowid"
        return [rollout_of(row) for row in self._rows(sql)]

    def completed_rollouts(self) -> list[RolloutRecord]:
        rows = self._rows(
            "SELECT * FROM rollouts WHERE state = 'COMPLETED'"
            " ORDER BY finished_at DESC, rowid DESC LIMIT 500"
        )
        return [rollout_of(row) for row in rows]

    def member_states(self, rollout_id: str) -> list[MemberState]:
        return [_member_state(row) for row in self._rows(_MEMBER_STATES, rollout_id)]

    def apply(
        self, rollout: RolloutRecord, actions: Sequence[Action], now: float
    ) -> list[Assignment] | None:
        with self._atomic():
            if not self._claim(rollout):
                return None
            made = []
            for action in actions:
                if isinstance(action, Assign):
                    made.append(self._assign_member(action, rollout, now))
                elif isinstance(action, AdvanceWave):
                    sql = "UPDATE rollouts SET wave = ?, clock_at = ? WHERE rollout_id = ?"
                    self._write(sql, action.wave, now, rollout.rollout_id)
                else:
                    self._set_state(rollout.rollout_id, action.state, action.reason, now)
                    if action.state is RolloutState.COMPLETED:
                        self._write(_LEFT_OVER, rollout.rollout_id)
            return made

    def set_state(
        self,
        rollout: RolloutRecord,
        state: RolloutState,
        reason: str,
        keep: bool,
        now: float,
        accepted_wave: int | None = None,
    ) -> bool:
        accepted = rollout.accepted_wave if accepted_wave is None else accepted_wave
        with self._atomic():
            if not self._claim(rollout):
                return False
            self._set_state(rollout.rollout_id, state, reason, now)
            sql = "UPDATE rollouts SET keep = ?, accepted_wave = ? WHERE rollout_id = ?"
            self._write(sql, int(keep), accepted, rollout.rollout_id)
            return True

    def keep_baselines(self, rollout_id: str, series: Mapping[str, Series]) -> None:
        rows = [(rollout_id, device_id, series_text(s)) for device_id, s in series.items()]
        with self._atomic():
            self._write_many(
                "INSERT INTO gate_baselines (rollout_id, device_id, series) VALUES (?, ?, ?)"
                " ON CONFLICT (rollout_id, device_id) DO UPDATE SET series = excluded.series",
                rows,
            )

    def baselines(self, rollout_id: str, device_id: str | None = None) -> dict[str, Series]:
        one, which = ("", []) if device_id is None else (" AND device_id = ?", [device_id])
        sql = f"SELECT device_id, series FROM gate_baselines WHERE rollout_id = ?{one}"
        found = self._rows(sql, rollout_id, *which)
        return {row["device_id"]: series_of(row["series"]) for row in found}

    def _claim(self, rollout: RolloutRecord) -> bool:
        sql = "UPDATE rollouts SET version = version + 1 WHERE rollout_id = ? AND version = ?"
        return self._write(sql, rollout.rollout_id, rollout.version) == 1

    def _set_state(self, rollout_id: str, state: RolloutState, reason: str, now: float) -> None:
        self._write(
            "UPDATE rollouts SET state = ?, reason = ?, clock_at = ?, finished_at = ?"
            " WHERE rollout_id = ?",
            *(state.value, reason, now, now if state.is_final else None, rollout_id),
        )

    def _assign_member(self, action: Assign, rollout: RolloutRecord, now: float) -> Assignment:
        made = self._assign(action, rollout, now)
        column = "rollback_generation" if action.is_rollback else "generation"
        self._write(
            f"UPDATE rollout_devices SET {column} = ? WHERE rollout_id = ? AND device_id = ?",
            *(made.generation, rollout.rollout_id, action.device_id),
        )
        return made

    def _assign(self, action: Assign, rollout: RolloutRecord, now: float) -> Assignment:
        made = Assignment(
            device_id=action.device_id,
            generation=self._next_generation(action.device_id),
            release_id=action.release_id,
            rollout_id=rollout.rollout_id,
            soak_s=rollout.spec.soak_s,
            is_rollback=action.is_rollback,
            created_at=now,
            download_bytes_per_s=rollout.spec.download_bytes_per_s,
        )
        self._insert("assignments", assignment_row(made))
        return made

    def _next_generation(self, device_id: str) -> int:
        """Above every generation the device was ever given, also when this database was restored
        from a backup: a generation must never mean two things."""
        newest = self.assignment(device_id)
        sql = (
            "SELECT json_extract(report, '$.generation') AS known FROM devices WHERE device_id = ?"
        )
        row = self._row(sql, device_id)
        return max(newest.generation if newest else 0, row["known"] if row else 0) + 1


def _overlap_message(overlapping: dict[str, list[str]]) -> str:
    rollout_id, devices = next(iter(overlapping.items()))
    more = (
        "" if len(devices) <= _SHOWN_CONFLICTS else f" and {len(devices) - _SHOWN_CONFLICTS} more"
    )
    return (
        f"rollout {rollout_id} is still open on {', '.join(devices[:_SHOWN_CONFLICTS])}{more}; "
        "wait for it, abort it, or start this one with --supersede"
    )


def _member_state(row: Row) -> MemberState:
    return MemberState(
        member=member_of(row),
        hostname=row["hostname"],
        labels={**json.loads(row["device_labels"]), **json.loads(row["operator_labels"])},
        is_barred=bool(row["is_barred"]),
        last_seen=row["last_seen"],
        forward=attempt_of(row, row["generation"], "forward"),
        back=attempt_of(row, row["rollback_generation"], "back"),
        last_good=row["last_good"],
        progress=row["progress"],
        error=row["error"],
        hold=row["hold"],
        late=LateState(row["late"]) if row["late"] else None,
        late_detail=row["late_detail"],
    )


def attempt_of(row: Row, generation: int | None, prefix: str) -> Attempt | None:
    if generation is None or row[f"{prefix}_at"] is None:
        return None
    phase = row[f"{prefix}_phase"]
    return Attempt(
        generation=generation,
        assigned_at=row[f"{prefix}_at"],
        phase=Phase(phase) if phase else None,
        is_nothing=row[f"{prefix}_release"] is None,
        served_at=row[f"{prefix}_served"],
    )
