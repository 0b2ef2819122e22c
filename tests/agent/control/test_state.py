"""What survives a power cut: record, exits, spools. And what does not fit is dropped, counted."""

from __future__ import annotations

import json
import sqlite3

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.control.activation import Desired, Record
from remora_agent.control.spool import EventSpool
from remora_agent.control.state import (
    Database,
    DeviceState,
    PastRuns,
    decode_record,
    encode_record,
)
from remora_contract.device_phase import Phase
from remora_contract.errors import Exhausted, InternalFault


@pytest.fixture
def database(tmp_path):
    made = Database(tmp_path / "state.db")
    yield made
    made.close()


text = st.text(max_size=20)
records = st.builds(
    Record,
    desired=st.builds(
        Desired,
        generation=st.integers(0, 1 << 60),
        release_id=text,
        release_json=text,
        rollout_id=text,
        soak_s=st.floats(0, 1e6),
        is_rollback=st.booleans(),
    ),
    phase=st.sampled_from(Phase),
    entered_at_s=st.floats(0, 1e9),
    committed=st.none() | text,
    previous=st.none() | text,
    error_code=text,
    error_message=text,
)


@given(records)
def test_a_record_comes_back_as_it_was(record):
    assert decode_record(encode_record(record)) == record


def test_a_saved_record_is_there_after_a_restart(tmp_path):
    record = Record(Desired(3, "a-1", "{}", "r", 1.0, False), Phase.BUILDING, 5.0, "b-1")
    first = Database(tmp_path / "state.db")
    DeviceState(first).save_record(record)
    first.close()
    second = Database(tmp_path / "state.db")
    assert DeviceState(second).record() == record
    second.close()


def test_a_file_that_is_no_database_says_what_to_do(tmp_path):
    (tmp_path / "state.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(InternalFault, match="move it away"):
        Database(tmp_path / "state.db")


def test_exits_count_only_within_one_boot_of_the_machine(database):
    state = DeviceState(database)
    assert state.begin_run("k1") == PastRuns(0, was_cut=False)
    assert [state.begin_run("k1") for _ in range(2)] == [PastRuns(1, True), PastRuns(2, True)]
    assert state.begin_run("k2") == PastRuns(2, True), "a power cut adds nothing"
    state.end_run()
    assert state.begin_run("k2") == PastRuns(0, was_cut=False)


def test_a_record_of_an_earlier_version_is_read():
    stored = json.loads(
        encode_record(Record(Desired(1, "a-1", "{}", "r1", 0.0, False), Phase.PROVING, 1.0))
    )
    del stored["cut_runs"]
    assert decode_record(json.dumps(stored)).cut_runs == 0


def test_events_keep_their_order_and_numbers_over_restarts(tmp_path):
    seen = []
    for _ in range(2):
        database = Database(tmp_path / "state.db")
        spool = EventSpool(database, 100, born_at_unix_s=1_000.0)
        spool.add("a", 1.0, {"x": 1})
        seen = [e.seq for e in spool.oldest(10)]
        database.close()
    assert seen == [1_000_001, 1_000_002]


def test_a_lost_database_never_reuses_numbers_the_controller_has_seen(tmp_path):
    old, new = Database(tmp_path / "old.db"), Database(tmp_path / "new.db")
    before, after = EventSpool(old, 100, 1_000.0), EventSpool(new, 100, 2_000.0)
    for _ in range(50):
        before.add("a", 1.0, {})
    after.add("a", 2.0, {})
    assert after.oldest(1)[0].seq > before.oldest(100)[-1].seq
    old.close()
    new.close()


def test_stored_events_are_forgotten_and_others_stay(database):
    spool = EventSpool(database, 100, 0.0)
    for i in range(5):
        spool.add("e", float(i), {"i": i})
    spool.stored_up_to(spool.oldest(5)[2].seq)
    assert [json.loads(e.detail_json)["i"] for e in spool.oldest(10)] == [3, 4]


def test_the_oldest_events_are_dropped_first_and_counted(database):
    spool = EventSpool(database, 20, 0.0)
    for i in range(50):
        spool.add("e", float(i), {"i": i})
    kept = [json.loads(e.detail_json)["i"] for e in spool.oldest(100)]
    assert kept[-1] == 49 and len(kept) <= 20
    assert spool.dropped == 50 - len(kept)


def test_a_huge_detail_is_cut(database):
    spool = EventSpool(database, 20, 0.0)
    spool.add("e", 0.0, {"text": "x" * 1_000_000})
    assert len(spool.oldest(1)[0].detail_json) < 5000


def test_a_full_disk_is_exhausted_not_a_database_error(database):
    with pytest.raises(Exhausted, match="disk is full"), database.transaction():
        raise sqlite3.OperationalError("database or disk is full")


def test_a_failed_transaction_leaves_nothing(database):
    with pytest.raises(ZeroDivisionError), database.transaction() as db:
        db["facts"].insert({"name": "x", "value": "y"})
        raise ZeroDivisionError
    assert database.fact("x") is None
