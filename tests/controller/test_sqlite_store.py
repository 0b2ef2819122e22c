"""The SQLite store keeps the contract, and its own promises."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from remora_contract.errors import Exhausted, Refused
from remora_controller.domain import MetricPoint, StoredEvent
from remora_controller.store import sqlite
from remora_controller.store.schema import MIGRATION_NAMES, migrations
from remora_controller.store.sqlite import SqliteStore
from tests.controller.store_contract import StoreContract, enrol


@pytest.fixture
def store(tmp_path):
    made = SqliteStore(tmp_path / "controller.db")
    yield made
    made.close()


class TestSqliteStore(StoreContract):
    pass


def test_what_was_stored_is_there_after_opening_again(tmp_path):
    path = tmp_path / "controller.db"
    first = SqliteStore(path)
    enrol(first, "d1", tier="prod")
    first.close()
    second = SqliteStore(path)
    assert second.device("d1").labels["tier"] == "prod"
    second.close()


def test_what_returned_survives_a_kill(tmp_path):
    path = tmp_path / "controller.db"
    script = (
        "import os, signal, sys; from pathlib import Path;"
        "from remora_controller.store.sqlite import SqliteStore;"
        "from tests.controller.store_contract import enrol;"
        "enrol(SqliteStore(Path(sys.argv[1])), 'd1');"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], cwd=Path.cwd(), check=False)
    assert ended.returncode == -signal.SIGKILL
    store = SqliteStore(path)
    assert store.device("d1") is not None
    store.close()


def without_room(store: SqliteStore) -> None:
    """What a full disk looks like to SQLite."""
    (row,) = store._db.query("PRAGMA page_count")
    store._db.execute(f"PRAGMA max_page_count = {row['page_count']}")


def test_a_full_disk_is_named_and_leaves_nothing_half_done(store):
    enrol(store, "d1")
    without_room(store)
    many = [StoredEvent(1.0, "d1", "e", "x" * 1000) for _ in range(2000)]
    with pytest.raises(Exhausted, match=r"controller\.db cannot grow; free space"):
        store.add_events(many)
    assert store.events(None, 10) == []
    assert store.device("d1") is not None


def test_a_database_of_a_newer_controller_is_refused(tmp_path, store):
    store._db["_sqlite_migrations"].insert(
        {"migration_set": "remora_controller", "name": "m9999_future", "applied_at": "2031"},
    )
    with pytest.raises(Refused, match=r"newer controller.*m9999_future"):
        SqliteStore(tmp_path / "controller.db")


def test_every_migration_is_known_by_name(store):
    assert {m.name for m in migrations.applied(store._db)} == MIGRATION_NAMES


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path):
    path = tmp_path / "controller.db"
    path.write_bytes(b"not a database at all, but long enough to look at" * 100)
    with pytest.raises(Refused, match=r"controller\.db cannot be opened"):
        SqliteStore(path)


def test_events_and_metrics_are_bounded(store, monkeypatch):
    monkeypatch.setattr(sqlite, "MAX_EVENTS", 10)
    monkeypatch.setattr(sqlite, "MAX_METRIC_POINTS", 10)
    store.add_events([StoredEvent(1.0, "d", f"e{n}", "{}") for n in range(50)])
    store.add_metrics([MetricPoint("d", "m", n, 100.0) for n in range(50)])
    store.prune(100.0)
    assert [e.name for e in store.events(None, 100)] == [f"e{n}" for n in range(49, 39, -1)]
    assert [p.value for p in store.metric_history("d", "m")] == list(range(40, 50))
