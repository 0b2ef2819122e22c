"""What arms of experiments counted, in SQLite."""

from __future__ import annotations

import json
from collections.abc import Sequence

from remora_controller.experiments.tally import ArmRow, Counted
from remora_controller.store.base import SqliteBase
from remora_controller.store.rows import Row


class SqliteExperiments(SqliteBase):
    def save_arm_counts(
        self, rows: Sequence[ArmRow], dropped: Sequence[tuple[str, str]] = ()
    ) -> None:
        with self._atomic():
            self._write_many(
                "DELETE FROM experiment_counts WHERE device_id = ? AND label = ?", dropped
            )
            # A device may have been removed since it told this.
            self._write_many(
                "INSERT INTO experiment_counts (device_id, label, at, counts)"
                " SELECT ?1, ?2, ?3, ?4 WHERE EXISTS"
                " (SELECT 1 FROM devices WHERE device_id = ?1 AND removed_at IS NULL)"
                " ON CONFLICT (device_id, label) DO UPDATE SET at = excluded.at,"
                " counts = excluded.counts",
                [(r.device_id, r.label, r.at, _dumped(r)) for r in rows],
            )

    def arm_counts(self) -> list[ArmRow]:
        rows = self._rows("SELECT * FROM experiment_counts ORDER BY device_id, label")
        return [_row_of(row) for row in rows]


def _dumped(row: ArmRow) -> str:
    pairs = {name: [c.told, c.carried] for name, c in sorted(row.counts.items())}
    return json.dumps(pairs, separators=(",", ":"))


def _row_of(row: Row) -> ArmRow:
    counts = {name: Counted(*pair) for name, pair in json.loads(row["counts"]).items()}
    return ArmRow(row["device_id"], row["label"], row["at"], counts)
