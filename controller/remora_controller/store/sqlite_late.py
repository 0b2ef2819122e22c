"""Devices that took a release after its waves, in SQLite."""

from __future__ import annotations

from remora_contract.device_phase import FINAL, Phase
from remora_controller.domain import Assignment, RolloutRecord, StoredEvent
from remora_controller.late_gates import LateState
from remora_controller.rollout import Assign
from remora_controller.store.late import LateFlag, LateMember
from remora_controller.store.sqlite_rollouts import LAST_GOOD, SqliteRollouts, attempt_of

_NEWEST = "(SELECT MAX(n.generation) FROM assignments n WHERE n.device_id = m.device_id)"
_LOOKED_AT = ", ".join(f"'{p.value}'" for p in (Phase.SOAKING, *sorted(FINAL, key=str)))
_MEMBERS = f"""
SELECT m.rollout_id, m.device_id, m.generation,
  f.created_at AS forward_at, f.phase AS forward_phase, f.release_id AS forward_release,
  f.served_at AS forward_served, {_NEWEST} AS newest, {LAST_GOOD} AS last_good,
  d.quarantine IS NOT NULL OR d.pin IS NOT NULL AS is_barred
FROM rollout_devices m
JOIN devices d ON d.device_id = m.device_id
JOIN assignments f ON f.device_id = m.device_id AND f.generation = m.generation
WHERE m.late = 'JUDGING' AND d.removed_at IS NULL
  AND (f.phase IN ({_LOOKED_AT}) OR {_NEWEST} <> m.generation)
ORDER BY m.rollout_id, m.device_id
"""
# The states of the index rollout_devices_flagged, word for word, or it is not used.
_FLAGS = f"""
SELECT m.device_id, m.rollout_id, m.late, m.late_detail FROM rollout_devices m
JOIN devices d ON d.device_id = m.device_id
WHERE m.late IN ('JUDGING', 'SENT_BACK', 'FAILED', 'INCONCLUSIVE') AND d.removed_at IS NULL
  AND COALESCE(m.rollback_generation, m.generation) = {_NEWEST}
"""
_END = (
    "UPDATE rollout_devices SET late = ?, late_detail = ?"
    " WHERE rollout_id = ? AND device_id = ? AND late = 'JUDGING' AND generation = ?"
)


class SqliteLate(SqliteRollouts):
    def late_members(self) -> list[LateMember]:
        return [
            LateMember(
                rollout_id=row["rollout_id"],
                device_id=row["device_id"],
                forward=forward,
                newest_generation=row["newest"],
                last_good=row["last_good"],
                is_barred=bool(row["is_barred"]),
            )
            for row in self._rows(_MEMBERS)
            if (forward := attempt_of(row, row["generation"], "forward")) is not None
        ]

    def late_standings(self, rollout_id: str) -> list[tuple[LateState, Phase | None, int]]:
        rows = self._rows(
            "SELECT m.late, f.phase, COUNT(*) AS count FROM rollout_devices m"
            " LEFT JOIN assignments f ON f.device_id = m.device_id AND f.generation = m.generation"
            " WHERE m.rollout_id = ? AND m.late <> '' GROUP BY m.late, f.phase",
            rollout_id,
        )
        return [
            (LateState(row["late"]), Phase(row["phase"]) if row["phase"] else None, row["count"])
            for row in rows
        ]

    def end_late(
        self, member: LateMember, state: LateState, detail: str, event: StoredEvent | None
    ) -> bool:
        with self._atomic():
            if not self._end_late(member, state, detail):
                return False
            if event is not None:
                self._insert("events", vars(event))
            return True

    def send_late_back(
        self,
        member: LateMember,
        rollout: RolloutRecord,
        release_id: str | None,
        detail: str,
        event: StoredEvent,
    ) -> Assignment | None:
        with self._atomic():
            newest = self.assignment(member.device_id)
            if newest is None or newest.generation != member.forward.generation:
                return None
            if not self._end_late(member, LateState.SENT_BACK, detail):
                return None
            self._insert("events", vars(event))
            action = Assign(member.device_id, release_id, is_rollback=True)
            return self._assign_member(action, rollout, event.at)

    def _end_late(self, member: LateMember, state: LateState, detail: str) -> bool:
        key = (member.rollout_id, member.device_id, member.forward.generation)
        return self._write(_END, state.value, detail, *key) == 1

    def late_flags(self) -> list[LateFlag]:
        return [
            LateFlag(
                row["device_id"], row["rollout_id"], LateState(row["late"]), row["late_detail"]
            )
            for row in self._rows(_FLAGS)
        ]
