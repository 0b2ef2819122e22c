"""The decision loop keeps house however much news there is."""

from __future__ import annotations

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import Exhausted
from remora_controller import loop as loops
from remora_controller.counters import Counters
from remora_controller.domain import BootTrail, MetricPoint
from remora_controller.driver import RolloutDriver
from remora_controller.loop import DecisionLoop
from remora_controller.presence import Presence
from remora_controller.store.sqlite import SqliteStore
from remora_controller.store_thread import StoreThread
from remora_controller.watchers import Watchers
from tests.controller.store_contract import enrol


@given(st.floats(0, 100))
def test_decisions_take_a_bounded_share_of_the_stores_time(seconds):
    wait_s = loops.gather_s(seconds)
    assert loops.GATHER_S <= wait_s <= loops.TICK_S
    share = seconds / (seconds + wait_s) if seconds else 0.0
    assert share <= loops.DECIDING_SHARE + 1e-9 or wait_s == loops.TICK_S


async def flood_until(decisions: DecisionLoop, done) -> None:
    """News without a pause until the condition holds."""
    task = asyncio.create_task(decisions.run())
    for _ in range(30_000):
        decisions.wake()
        await asyncio.sleep(0.001)
        if done():
            break
    decisions.stop()
    await task


def test_heartbeats_are_flushed_while_news_never_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "TICK_S", 0.05)
    monkeypatch.setattr(loops, "FLUSH_EVERY", 1)
    store, thread, counters = SqliteStore(tmp_path / "c.db"), StoreThread(), Counters()
    enrol(store, "d1")
    presence = Presence(0.0, 30.0)
    presence.seen("d1", BootTrail("b", 4), 50.0, is_stored=False)
    driver = RolloutDriver(store, presence, lambda _: None)
    decisions = DecisionLoop(store, thread, driver, presence, Watchers(), counters, lambda: 60.0)
    asyncio.run(flood_until(decisions, lambda: counters.devices_by_status))
    assert counters.devices_by_status == {"online": 1}
    assert store.device("d1").trail == BootTrail("b", 4)
    thread.close()
    store.close()


def test_a_full_disk_stops_no_decision_loop(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(loops, "TICK_S", 0.02)
    monkeypatch.setattr(loops, "FLUSH_EVERY", 1)
    store, thread, counters = SqliteStore(tmp_path / "c.db"), StoreThread(), Counters()
    enrol(store, "d1")
    presence, room = Presence(0.0, 30.0), threading.Event()
    real = store.record_sightings

    def record(sightings):
        if not room.is_set():
            raise Exhausted("the controller's disk is full")
        real(sightings)

    monkeypatch.setattr(store, "record_sightings", record)

    def done() -> bool:
        presence.seen("d1", BootTrail("b", 5), 51.0, is_stored=False)
        if "store.full" in caplog.messages:
            room.set()
        return store.device("d1").trail == BootTrail("b", 5)

    driver = RolloutDriver(store, presence, lambda _: None)
    decisions = DecisionLoop(store, thread, driver, presence, Watchers(), counters, lambda: 60.0)
    asyncio.run(flood_until(decisions, done))
    assert store.device("d1").trail == BootTrail("b", 5)
    assert caplog.messages.count("store.full") == 1
    thread.close()
    store.close()


@pytest.mark.parametrize("full", ["add_metrics", "record_sightings", "save_arm_counts"])
def test_what_a_full_disk_does_not_take_is_stored_with_the_next_flush(tmp_path, monkeypatch, full):
    store, thread = SqliteStore(tmp_path / "c.db"), StoreThread()
    enrol(store, "d1")
    presence = Presence(0.0, 30.0)
    driver = RolloutDriver(store, presence, lambda _: None)
    decisions = DecisionLoop(store, thread, driver, presence, Watchers(), Counters(), lambda: 60.0)
    label = "e/arm/" + "0" * 12
    presence.seen("d1", BootTrail("b", 4), 50.0, is_stored=False)
    arm = MetricPoint("d1", f"experiment_requests_total.{label}", 3.0, 50.0)
    presence.add_metrics("d1", [MetricPoint("d1", "ttft_s", 0.5, 50.0), arm])

    def refuse(*_):
        raise Exhausted("the controller's disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, full, refuse)
        with pytest.raises(Exhausted):
            asyncio.run(decisions.flush())
    asyncio.run(decisions.flush())
    assert [p.value for p in store.metric_samples({"ttft_s"}, 0.0)] == [0.5]
    assert store.device("d1").trail == BootTrail("b", 4)
    assert [r.label for r in store.arm_counts()] == [label]
    thread.close()
    store.close()
