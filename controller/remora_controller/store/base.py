"""A SQLite connection set up for this program, shared by the parts of the SQLite store."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from remora_contract.errors import Exhausted, Refused
from remora_controller.store.rows import Row
from remora_controller.store.schema import migrate

_RETRY_AFTER_S = 30.0


class SqliteBase:
    """WAL, so that readers never wait; synchronous=FULL, because a device must never meet a
    generation that a power cut made the controller forget."""

    def __init__(self, path: Path) -> None:
        try:
            connection = sqlite3.connect(path, check_same_thread=False, timeout=10)
            self._db = Database(connection)
            self._db.enable_wal()
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            migrate(self._db, str(path))
        except sqlite3.DatabaseError as e:
            raise Refused(f"{path} cannot be opened as the controller's database: {e}") from e
        self._path = path

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _atomic(self) -> Iterator[None]:
        """One transaction; all writes are in one. Raises Exhausted when the disk is full: then
        nothing of it happened."""
        try:
            with self._db.atomic():
                yield
        except sqlite3.OperationalError as e:
            if "full" not in str(e):
                raise
            raise Exhausted(
                f"the controller's disk is full: {self._path} cannot grow; free space there: "
                "devices serve on and report again",
                _RETRY_AFTER_S,
            ) from e

    def _rows(self, sql: str, *arguments: Any) -> list[Row]:
        return list(self._db.query(sql, arguments))

    def _row(self, sql: str, *arguments: Any) -> Row | None:
        return next(iter(self._rows(sql, *arguments)), None)

    def _write(self, sql: str, *arguments: Any) -> int:
        """Number of rows changed."""
        return int(self._db.execute(sql, arguments).rowcount)

    def _write_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Inside `self._atomic()`: one statement, many rows."""
        self._db.conn.executemany(sql, rows)

    def _insert(self, table: str, row: Row) -> None:
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        self._write(f"INSERT INTO {table} ({names}) VALUES ({marks})", *row.values())
