"""state.db: the activation record and the small facts that must survive a power cut.

SQLite through sqlite-utils, WAL, synchronous=FULL: a returned `save_record` is on disk. Owns the
connection that the spools share (`spool`, `telemetry.spool`); knows no phase and no network.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sqlite_utils

from remora_agent.control.activation import Desired, Record
from remora_contract.device_phase import Phase
from remora_contract.errors import Exhausted, InternalFault
from remora_contract.strict import loads

_SCHEMA = """
create table if not exists facts (name text primary key, value text not null);
create table if not exists events (
  seq integer primary key autoincrement, at_s real not null, name text not null,
  detail text not null);
create table if not exists samples (
  id integer primary key, at_s real not null, name text not null, value real not null);
create table if not exists counters (name text primary key, value real not null);
"""


class Database:
    """One connection, one lock: several threads write, one at a time."""

    def __init__(self, path: Path) -> None:
        """Raises InternalFault when the file is no database of ours."""
        self._lock = threading.RLock()
        try:
            connection = sqlite3.connect(path, check_same_thread=False, timeout=10.0)
            self._db = sqlite_utils.Database(connection)
            self._db.enable_wal()
            connection.execute("pragma synchronous=full")
            connection.executescript(_SCHEMA)
            connection.commit()
        except sqlite3.DatabaseError as e:
            raise InternalFault(
                f"{path} cannot be opened ({e}); move it away and restart: the controller assigns "
                "the release again"
            ) from e

    @contextmanager
    def transaction(self) -> Iterator[sqlite_utils.Database]:
        """Commits at the end, rolls back on an error; an inner one is part of the outer one.
        Raises Exhausted when the disk is full."""
        with self._lock:
            connection = self._db.conn
            try:
                if connection.in_transaction:
                    yield self._db
                    return
                with connection:
                    connection.execute("begin immediate")
                    yield self._db
            except sqlite3.OperationalError as e:
                if "full" in str(e):
                    raise Exhausted("state.db cannot grow: the disk is full; free space") from e
                raise

    def rows(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return list(self._db.conn.execute(sql, parameters).fetchall())

    def fact(self, name: str) -> str | None:
        found = self.rows("select value from facts where name = ?", (name,))
        return None if not found else str(found[0][0])

    def set_facts(self, facts: dict[str, str]) -> None:
        # Plain SQL: sqlite-utils would read the schema again for each of these small writes.
        sql = (
            "insert into facts (name, value) values (?, ?)"
            " on conflict (name) do update set value = excluded.value"
        )
        with self.transaction() as db:
            db.conn.executemany(sql, list(facts.items()))

    def close(self) -> None:
        with self._lock:
            self._db.conn.close()


@dataclass(frozen=True)
class PastRuns:
    """How the agent's runs ended before this one."""

    abnormal_exits: int = 0  # in a row; a machine that went down with its agent adds nothing
    was_cut: bool = False  # the last one ended without `end_run`, whatever the reason


class DeviceState:
    """The facts by their meaning."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self) -> Record | None:
        """Raises DocumentInvalid when the stored record is not one of this version's."""
        text = self._database.fact("activation")
        return None if text is None else decode_record(text)

    def save_record(self, record: Record, forgives: bool = False) -> None:
        """`forgives`: earlier abnormal exits no longer count, in the same transaction."""
        exits = {"abnormal_exits": "0"} if forgives else {}
        self._database.set_facts({"activation": encode_record(record), **exits})

    def begin_run(self, kernel_boot_id: str) -> PastRuns:
        """Marks the agent as running.

        A run that ended with its machine's (another kernel boot) is a power cut, not a crash."""
        exits = int(self._database.fact("abnormal_exits") or 0)
        running_in = self._database.fact("running_in")
        if running_in == kernel_boot_id:
            exits += 1
        facts = {"running_in": kernel_boot_id, "abnormal_exits": str(exits)}
        self._database.set_facts(facts)
        return PastRuns(exits, was_cut=bool(running_in))

    def forgive_exits(self) -> None:
        """The run has been healthy long enough: earlier exits no longer count."""
        self._database.set_facts({"abnormal_exits": "0"})

    def end_run(self) -> None:
        self._database.set_facts({"running_in": "", "abnormal_exits": "0"})


def encode_record(record: Record) -> str:
    return json.dumps(asdict(record) | {"phase": record.phase.value})


def decode_record(text: str) -> Record:
    values = json.loads(text)
    desired = loads(Desired, json.dumps(values.pop("desired")), "state.db: activation")
    return Record(desired=desired, phase=Phase(values.pop("phase")), **values)
