"""Tickets of shared engines, in SQLite."""

from __future__ import annotations

import json
from typing import Any

from remora_contract.engine import EngineKey
from remora_contract.strict import loads, parse
from remora_controller.domain import StoredEvent
from remora_controller.sharing.tickets import SharedEngine, State, Ticket
from remora_controller.store.base import SqliteBase
from remora_controller.store.rows import Row, dumps
from remora_controller.store.sharing import TicketRecord

_OF = "WHERE key = ? AND scope = ?"
_TICKETS = """
SELECT t.*, (SELECT COUNT(*) FROM engine_askers a
             WHERE a.key = t.key AND a.scope = t.scope AND a.taken = 1) AS taken
FROM engine_tickets t
"""


class SqliteSharing(SqliteBase):
    def ticket(self, key_digest: str, scope: str) -> TicketRecord | None:
        row = self._row(f"{_TICKETS} {_OF}", key_digest, scope)
        return _record_of(row) if row else None

    def tickets(self) -> list[TicketRecord]:
        return [_record_of(row) for row in self._rows(f"{_TICKETS} ORDER BY key, scope")]

    def save_ticket(self, record: TicketRecord, events: tuple[StoredEvent, ...] = ()) -> None:
        key, ticket = record.key.digest, _dumped(record.ticket)
        with self._atomic():
            self._write(
                "INSERT INTO engine_tickets (key, scope, key_json, ticket, used_at)"
                " VALUES (?, ?, ?, ?, ?)"
                " ON CONFLICT (key, scope) DO UPDATE SET ticket = excluded.ticket",
                *(key, record.scope, dumps(record.key), ticket, record.used_at),
            )
            if record.ticket.state is not State.READY:
                self._write(f"UPDATE engine_askers SET taken = 0 {_OF}", key, record.scope)
            for event in events:
                self._insert("events", vars(event))

    def remove_ticket(self, key_digest: str, scope: str, event: StoredEvent) -> bool:
        with self._atomic():
            self._write(f"DELETE FROM engine_askers {_OF}", key_digest, scope)
            found = self._write(f"DELETE FROM engine_tickets {_OF}", key_digest, scope)
            if found:
                self._insert("events", vars(event))
        return bool(found)

    def waiting_since(self, key_digest: str, scope: str, device_id: str) -> float | None:
        sql = f"SELECT since FROM engine_askers {_OF} AND device_id = ?"
        row = self._row(sql, key_digest, scope, device_id)
        return row["since"] if row else None

    def note_waiting(self, key_digest: str, scope: str, device_id: str, now: float) -> None:
        with self._atomic():
            self._write(
                "INSERT INTO engine_askers (key, scope, device_id, since, taken)"
                " VALUES (?, ?, ?, ?, 0) ON CONFLICT (key, scope, device_id)"
                " DO UPDATE SET since = COALESCE(since, excluded.since)",
                *(key_digest, scope, device_id, now),
            )

    def forget_waiting(self, key_digest: str, scope: str, device_id: str) -> None:
        with self._atomic():
            sql = f"UPDATE engine_askers SET since = NULL {_OF} AND device_id = ?"
            self._write(sql, key_digest, scope, device_id)

    def note_taken(self, key_digest: str, scope: str, device_id: str, now: float) -> None:
        with self._atomic():
            self._write(
                "INSERT INTO engine_askers (key, scope, device_id, since, taken)"
                " VALUES (?, ?, ?, NULL, 1) ON CONFLICT (key, scope, device_id)"
                " DO UPDATE SET since = NULL, taken = 1",
                *(key_digest, scope, device_id),
            )
            self._write(f"UPDATE engine_tickets SET used_at = ? {_OF}", now, key_digest, scope)


def _dumped(ticket: Ticket) -> str:
    return dumps({**vars(ticket), "state": ticket.state.value})


def _record_of(row: Row) -> TicketRecord:
    values: dict[str, Any] = json.loads(row["ticket"])
    engine = values.pop("engine", None)
    rejected = tuple(values.pop("rejected", ()))
    ticket = Ticket(
        **{
            **values,
            "state": State(values["state"]),
            "engine": None if engine is None else parse(SharedEngine, engine, "ticket"),
            "rejected": rejected,
        }
    )
    key = loads(EngineKey, row["key_json"], "ticket")
    return TicketRecord(key, row["scope"], ticket, row["taken"], row["used_at"])
