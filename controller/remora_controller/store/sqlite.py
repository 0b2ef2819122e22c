"""The default store: one SQLite file, through sqlite-utils, written in batches.

Events, metrics and old assignments are bounded here; see `prune`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from remora_controller.domain import MetricPoint, StoredEvent
from remora_controller.store.rows import Row
from remora_controller.store.sqlite_devices import SqliteDevices
from remora_controller.store.sqlite_experiments import SqliteExperiments
from remora_controller.store.sqlite_governance import SqliteGovernance
from remora_controller.store.sqlite_late import SqliteLate
from remora_controller.store.sqlite_sharing import SqliteSharing

MAX_EVENTS = 100_000
MAX_METRIC_POINTS = 500_000
METRIC_HISTORY_S = 6 * 3600.0
SPENT_TOKENS_KEPT_S = 7 * 24 * 3600.0
ASSIGNMENTS_KEPT = 32
BASELINES_KEPT_S = 7 * 24 * 3600.0

# Keeps the newest of each device and whatever it committed last.
_PRUNE_ASSIGNMENTS = """
DELETE FROM assignments AS a
WHERE a.generation <= (SELECT MAX(b.generation) - ? FROM assignments b
                       WHERE b.device_id = a.device_id)
  AND a.generation <> COALESCE((SELECT MAX(c.generation) FROM assignments c
                       WHERE c.device_id = a.device_id AND c.phase = 'COMMITTED'), -1)
"""


class SqliteStore(SqliteDevices, SqliteLate, SqliteGovernance, SqliteSharing, SqliteExperiments):
    """Implements `store.protocol.Store`."""

    def add_events(self, events: Sequence[StoredEvent]) -> None:
        with self._atomic():
            self._write_many(
                "INSERT INTO events (at, device_id, name, detail_json) VALUES (?, ?, ?, ?)",
                [(e.at, e.device_id, e.name, e.detail_json) for e in events],
            )

    def events(
        self, device_id: str | None, limit: int, name: str | None = None
    ) -> list[StoredEvent]:
        rows = self._rows(
            "SELECT at, device_id, name, detail_json FROM events"
            " WHERE (?1 IS NULL OR device_id = ?1) AND (?2 IS NULL OR name = ?2)"
            " ORDER BY id DESC LIMIT ?3",
            *(device_id, name, limit),
        )
        return [StoredEvent(**row) for row in rows]

    def add_metrics(self, points: Sequence[MetricPoint]) -> None:
        rows = [(p.device_id, p.name, p.value, p.at) for p in points]
        # One write for each name: a device tells of minutes at once.
        newest = {row[:2]: row for row in sorted(rows, key=lambda row: row[3])}
        with self._atomic():
            self._write_many(
                "INSERT INTO metrics_history (device_id, name, value, at) VALUES (?, ?, ?, ?)", rows
            )
            self._write_many(
                "INSERT INTO metrics_latest (device_id, name, value, at) VALUES (?, ?, ?, ?)"
                " ON CONFLICT (device_id, name) DO UPDATE SET value = excluded.value,"
                " at = excluded.at WHERE excluded.at >= at",
                newest.values(),
            )

    def latest_metrics(self) -> dict[str, dict[str, MetricPoint]]:
        found: dict[str, dict[str, MetricPoint]] = {}
        for row in self._rows("SELECT * FROM metrics_latest"):
            found.setdefault(row["device_id"], {})[row["name"]] = MetricPoint(**row)
        return found

    def metric_history(self, device_id: str, name: str) -> list[MetricPoint]:
        rows: list[Row] = self._rows(
            "SELECT device_id, name, value, at FROM metrics_history"
            " WHERE device_id = ? AND name = ? ORDER BY at, id",
            *(device_id, name),
        )
        return [MetricPoint(**row) for row in rows]

    def metric_samples(
        self, names: Collection[str], since: float, device_ids: Collection[str] | None = None
    ) -> list[MetricPoint]:
        wanted = sorted(names)
        marks = ", ".join("?" * len(wanted))
        # A metric's labels follow a dot.
        plain = "substr(name, 1, instr(name || '.', '.') - 1)"
        some = "" if device_ids is None else "device_id IN (SELECT value FROM json_each(?)) AND "
        rows = self._rows(
            "SELECT device_id, name, value, at FROM metrics_history"
            f" WHERE {some}at >= ? AND (name IN ({marks}) OR {plain} IN ({marks}))"
            " ORDER BY device_id, id",
            *(
                *([] if device_ids is None else [json.dumps(sorted(device_ids))]),
                since,
                *wanted,
                *wanted,
            ),
        )
        return [MetricPoint(**row) for row in rows]

    def prune(self, now: float) -> None:
        with self._atomic():
            self._write(
                "DELETE FROM gate_baselines WHERE rollout_id IN"
                " (SELECT rollout_id FROM rollouts WHERE finished_at < ?) AND NOT EXISTS"
                " (SELECT 1 FROM rollout_devices m WHERE m.late = 'JUDGING'"
                " AND m.rollout_id = gate_baselines.rollout_id"
                " AND m.device_id = gate_baselines.device_id)",
                now - BASELINES_KEPT_S,
            )
            self._write("DELETE FROM metrics_history WHERE at < ?", now - METRIC_HISTORY_S)
            self._keep_newest("metrics_history", MAX_METRIC_POINTS)
            self._keep_newest("events", MAX_EVENTS)
            tokens = "DELETE FROM join_tokens WHERE expires_at < ?"
            self._write(tokens, now - SPENT_TOKENS_KEPT_S)
            self._write(_PRUNE_ASSIGNMENTS, ASSIGNMENTS_KEPT)

    def _keep_newest(self, table: str, count: int) -> None:
        sql = f"DELETE FROM {table} WHERE id <= (SELECT COALESCE(MAX(id), 0) - ? FROM {table})"
        self._write(sql, count)
