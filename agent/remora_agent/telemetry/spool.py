"""Metric samples that wait for the controller: bounded, batched, oldest detail dropped first.

Levels are spooled sample by sample. Counters are not: their running total over all restarts is kept
in one row each, so that no outage, however long, loses a token or an error from the count.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from remora_agent.control.state import Database
from remora_agent.telemetry.source import Reading
from remora_contract.errors import Exhausted
from remora_contract.experiments import ARM_PREFIX, SHADOW_PREFIX

log = logging.getLogger(__name__)
_FLUSH_SAMPLES = 500
_ALMOST = 0.99  # a timer that fires a little early skips no sample


@dataclass(frozen=True)
class Sample:
    name: str
    value: float
    at_unix_s: float


class MetricSpool:
    """New samples stay in memory while the controller takes them; only what it does not take in
    time reaches the disk, in transactions of hundreds of rows."""

    def __init__(self, database: Database, capacity: int) -> None:
        self._database, self._capacity = database, capacity
        self._lock = threading.RLock()
        self._fresh: list[Sample] = []
        # Levels are numbered in order, in memory already: a number names one sample wherever it is.
        self._next = 1 + int(database.rows("select coalesce(max(id), 0) from samples")[0][0])
        self._base = {str(n): float(v) for n, v in database.rows("select * from counters")}
        self._last: dict[str, float] = {}
        self._every_s = 0.0  # levels closer together than this are not kept
        self._kept_at_s = float("-inf")
        self._totals: dict[str, Sample] = {}
        self._told: frozenset[str] = frozenset()  # names of the last readings

    def thin(self, every_s: float) -> None:
        """From now on keeps a sample of all levels so often; 0: every one."""
        with self._lock:
            self._every_s = every_s

    def add(self, readings: Iterable[Reading], at_unix_s: float) -> None:
        readings = tuple(readings)
        with self._lock:
            self._told = frozenset(reading.wire_name for reading in readings)
            is_kept = self._is_due(at_unix_s)
            for reading in readings:
                name = reading.wire_name
                if reading.is_counter:
                    self._totals[name] = Sample(name, self._total(name, reading), at_unix_s)
                elif is_kept:
                    self._fresh.append(Sample(name, reading.value, at_unix_s))
                    self._next += 1
            if len(self._fresh) >= _FLUSH_SAMPLES:
                self.flush()

    def _is_due(self, at_unix_s: float) -> bool:
        """Also after the clock was set back."""
        since_s = at_unix_s - self._kept_at_s
        if 0 <= since_s < self._every_s * _ALMOST:
            return False
        self._kept_at_s = at_unix_s
        return True

    def _total(self, name: str, reading: Reading) -> float:
        """Over the life of the identity: a counter that falls was started again at zero."""
        if reading.value < self._last.get(name, 0.0):
            self._base[name] = self._base.get(name, 0.0) + self._last[name]
        self._last[name] = reading.value
        return self._base.get(name, 0.0) + reading.value

    def batch(self, limit: int) -> tuple[list[Sample], int]:
        """Counters as they stand and the oldest levels, `limit` together, and a mark for `sent`."""
        with self._lock:
            totals = [t for n, t in self._totals.items() if n in self._told or not _passes(n)]
            limit = max(1, limit - len(totals))  # of levels: some go on whatever else is told
            spooled = self._database.rows(
                "select id, name, value, at_s from samples order by id limit ?", (limit,)
            )
            levels = [Sample(str(n), float(v), float(t)) for _, n, v, t in spooled]
            mark = int(spooled[-1][0]) if spooled else 0
            # What is on disk is older than what is in memory: memory only once the disk is empty.
            if fresh := self._fresh[: limit - len(levels)]:
                mark = self._first_fresh() + len(fresh) - 1
            return [*totals, *levels, *fresh], mark

    def sent(self, mark: int) -> None:
        """The controller has the levels up to `mark`, whatever was flushed or dropped since."""
        with self._lock:
            with self._database.transaction() as db:
                db.conn.execute("delete from samples where id <= ?", (mark,))
            del self._fresh[: max(0, mark + 1 - self._first_fresh())]

    def _first_fresh(self) -> int:
        return self._next - len(self._fresh)

    def waiting(self) -> int:
        with self._lock:
            return len(self._fresh) + self._spooled()

    def flush(self) -> None:
        """Everything in memory to disk; the oldest beyond the capacity go."""
        with self._lock:
            rows = [
                {"id": i, "at_s": s.at_unix_s, "name": s.name, "value": s.value}
                for i, s in enumerate(self._fresh, self._first_fresh())
            ]
            totals = [{"name": s.name, "value": s.value} for s in self._totals.values()]
            try:
                with self._database.transaction() as db:
                    db["samples"].insert_all(rows, batch_size=_FLUSH_SAMPLES)
                    db["counters"].upsert_all(totals, pk="name")
                    self._trim(db)
            except Exhausted as e:
                log.warning("metrics.dropped", extra={"count": len(rows), "cause": str(e)})
            self._fresh.clear()

    def _trim(self, db: object) -> None:
        excess = self._spooled() - self._capacity
        if excess > 0:
            db.conn.execute(  # type: ignore[attr-defined]
                "delete from samples where id in (select id from samples order by id limit ?)",
                (excess,),
            )
            log.warning("metrics.dropped", extra={"count": excess})

    def _spooled(self) -> int:
        return int(self._database.rows("select count(*) from samples")[0][0])


def _passes(name: str) -> bool:
    """Whether the counter is of something that comes and goes with releases: told only as long as
    it is counted."""
    return name.startswith((ARM_PREFIX, SHADOW_PREFIX))
