"""Events that wait for the controller: bounded, oldest dropped first, drops counted.

Sequence numbers grow for the life of the identity, also when state.db is lost: they start at the
milliseconds since 1970 of the database's birth.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from remora_agent.control.state import Database

log = logging.getLogger(__name__)
_MAX_DETAIL_BYTES = 4096


@dataclass(frozen=True)
class SpooledEvent:
    seq: int
    at_unix_s: float
    name: str
    detail_json: str


class EventSpool:
    def __init__(self, database: Database, capacity: int, born_at_unix_s: float) -> None:
        """`born_at_unix_s` is used once, when the spool is new."""
        self._database = database
        self._capacity = capacity
        with database.transaction() as db:
            if not list(db.conn.execute("select 1 from sqlite_sequence where name='events'")):
                seed = int(born_at_unix_s * 1000)
                db.conn.execute("insert into sqlite_sequence values ('events', ?)", (seed,))

    def add(self, name: str, at_unix_s: float, detail: Mapping[str, object]) -> None:
        text = json.dumps(dict(detail), default=str)
        if len(text) > _MAX_DETAIL_BYTES:
            text = json.dumps({"truncated": text[:_MAX_DETAIL_BYTES]})
        with self._database.transaction() as db:
            db.conn.execute(
                "insert into events (at_s, name, detail) values (?, ?, ?)", (at_unix_s, name, text)
            )
            excess = self._count() - self._capacity
            if excess > 0:
                # A tenth at a time: a full spool does not delete on every single event.
                self._drop(db.conn, excess + self._capacity // 10)

    def oldest(self, limit: int) -> list[SpooledEvent]:
        rows = self._database.rows(
            "select seq, at_s, name, detail from events order by seq limit ?", (limit,)
        )
        return [SpooledEvent(*row) for row in rows]

    def stored_up_to(self, seq: int) -> None:
        """The controller has them: forget events up to `seq`."""
        with self._database.transaction() as db:
            db.conn.execute("delete from events where seq <= ?", (seq,))

    @property
    def dropped(self) -> int:
        """Events that no controller will ever see."""
        return int(self._database.fact("events_dropped") or 0)

    def _count(self) -> int:
        return int(self._database.rows("select count(*) from events")[0][0])

    def _drop(self, connection: object, count: int) -> None:
        gone = connection.execute(  # type: ignore[attr-defined]
            "delete from events where seq in (select seq from events order by seq limit ?)",
            (count,),
        ).rowcount
        self._database.set_facts({"events_dropped": str(self.dropped + gone)})
        log.warning("events.dropped", extra={"count": gone, "capacity": self._capacity})
