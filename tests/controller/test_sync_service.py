"""Sync and Watch through the whole controller: real servers, real mTLS, real stubs."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract import errors
from remora_contract.held import Held
from remora_controller.services.fleet import JITTER, spread_s, watched_interval_s
from remora_controller.services.wire import held_of
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller.harness import WAIT_S, fleet, wait_for
from tests.controller.operating import create_release, devices_by_id, online, refused, start


def test_sync_answers_not_modified_once_the_device_knows(world):
    (device,) = online(world, 1)
    start(world, create_release(world))
    wait_for("it is assigned", lambda: device.sync().WhichOneof("answer") == "desired")
    assert device.sync().WhichOneof("answer") == "not_modified"
    assert device.desired.release_json.startswith(b"{")


def test_events_are_acknowledged_only_once_stored_and_never_doubled(world):
    (device,) = online(world, 1)
    event = cp.DeviceEvent(seq=7, at_unix_s=5.0, name="engine.built", detail_json='{"seconds": 3}')
    assert device.sync(events=[event]).events_stored_up_to == 7
    assert device.sync(events=[event]).events_stored_up_to == 7
    request = op.ListEventsRequest(device_id=device.device_id)
    events = world.operator.ListEvents(request, timeout=WAIT_S).events
    assert [(e.name, e.at_unix_s) for e in events] == [("engine.built", 5.0)]


def test_build_history_informs_the_plan(world):
    (device,) = online(world, 1)
    for seq, (seconds, cached) in enumerate([(3, "false"), (5, "false"), (0.1, "true")], start=1):
        detail = f'{{"seconds": {seconds}, "from_cache": {cached}}}'
        device.sync(events=[cp.DeviceEvent(seq=seq, name="engine.built", detail_json=detail)])
    plan = world.operator.Plan(op.PlanRequest(release=create_release(world)), timeout=WAIT_S)
    assert (plan.devices[0].build_s_known, plan.devices[0].build_s) == (True, 4.0)


def test_metrics_show_in_top(world):
    (device,) = online(world, 1)
    metrics = [
        cp.Metric(name="tokens_per_s", value=50.0, at_unix_s=100.0),
        cp.Metric(name="tokens_per_s", value=40.0, at_unix_s=90.0),
        cp.Metric(name="temperature_celsius.Package id 0", value=61.0, at_unix_s=100.0),
        cp.Metric(name="broken", value=float("nan"), at_unix_s=100.0),
    ]
    device.sync(metrics=metrics)
    (row,) = world.operator.Top(op.TopRequest(), timeout=WAIT_S).rows
    assert dict(row.metrics) == {
        "tokens_per_s": 50.0,
        "temperature_celsius.Package id 0": 61.0,
    }


def test_devices_that_fetch_share_what_their_rollout_may_take_together(world):
    one, two = online(world, 2)
    spec = op.RolloutSpec(total_bytes_per_s=100_000, waves=[op.Wave(percent=100)])
    start(world, create_release(world), spec=spec)
    for device in (one, two):
        wait_for("it is assigned", lambda d=device: d.sync() and d.generation == 1)
        assert device.desired.shares_bandwidth
    held = cp.Fetching(share_bytes_per_s=70_000)
    assert one.sync(fetching=held).download_share.bytes_per_s == 70_000, "held over a restart"
    limited = cp.Fetching(limit_bytes_per_s=30_000, share_bytes_per_s=50_000)
    assert two.sync(fetching=limited).download_share.bytes_per_s == 30_000
    assert not one.sync().HasField("download_share"), "it does not fetch"


def test_a_watch_is_poked_when_something_is_assigned(world):
    (device,) = online(world, 1)
    watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
    start(world, create_release(world))
    assert next(watch).generation == 1
    watch.cancel()


def test_a_watch_opened_after_the_assignment_is_told_at_once(world):
    (device,) = online(world, 1)
    start(world, create_release(world))
    wait_for("it is assigned", lambda: device.sync() and device.generation == 1)
    watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
    assert next(watch).generation == 1
    watch.cancel()


@pytest.mark.parametrize(
    ("devices", "expected"),
    [(0, 10.0), (1, 10.0), (55, 10.0), (110, 20.0), (990, 180.0), (9**9, 180.0)],
)
def test_at_rest_a_fleet_asks_so_often_together_and_each_device_often_enough(devices, expected):
    assert watched_interval_s(10.0, devices) == expected


def test_no_device_is_asked_to_wait_for_longer_than_agents_take():
    assert watched_interval_s(3600.0, 9**9) == 3600.0


def is_about(asked_s: float, interval_s: float) -> bool:
    return abs(asked_s - interval_s) <= JITTER * interval_s * (1 + 1e-9)


def asked_about(device, interval_s: float) -> bool:
    return is_about(device.sync().next_sync_after_s, interval_s)


@given(st.floats(0.0, 1.0, exclude_max=True), st.floats(0.1, 3600.0))
def test_devices_that_came_back_together_do_not_stay_together(unit, interval):
    assert is_about(spread_s(interval, unit), interval)


def test_a_reconnect_in_one_second_is_spread_over_minutes_after_a_few_rounds():
    rng = random.Random(3)
    at = [rng.random() for _ in range(2000)]
    for _ in range(5):
        at = [t + spread_s(180.0, rng.random()) for t in at]
    a_second = Counter(int(t) for t in at)
    assert max(a_second.values()) < 30, "of 2000"


def test_at_rest_fewer_samples_are_wanted_the_larger_the_fleet_and_all_while_a_gate_looks(
    home, monkeypatch
):
    monkeypatch.setattr("remora_controller.services.fleet.CALM_SYNCS_PER_S", 0.05)
    with fleet(home, sync_interval_s=10.0, offline_after_s=45.0) as world:
        (device,) = online(world, 1)
        assert device.sync().sample_every_s == 20.0
        other = world.device(site="other")
        other.sync()
        assert device.sync().sample_every_s == 40.0
        request = op.StartRolloutRequest(
            release=create_release(world),
            selector="site=other",
            spec=op.RolloutSpec(waves=[op.Wave(count=1)]),
        )
        world.operator.StartRollout(request, timeout=WAIT_S)
        wait_for("it counts", lambda: device.sync().sample_every_s == 0.0)
        wait_for("it is assigned", lambda: other.sync() and other.generation == 1)
        assert other.sync().sample_every_s == 0.0


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device counts as a large fleet."""
    monkeypatch.setattr("remora_controller.services.fleet.CALM_SYNCS_PER_S", 1e-3)


def test_a_device_that_can_be_poked_is_asked_to_sync_less_often(home, large):
    with fleet(home, sync_interval_s=10.0, offline_after_s=45.0) as world:
        (device,) = online(world, 1)
        assert asked_about(device, 10.0)
        watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
        wait_for("the stream counts", lambda: asked_about(device, 180.0))
        start(world, create_release(world))
        next(watch)
        assert device.sync().next_sync_after_s == 2.0
        device.phase = "COMMITTED"
        asked_s = device.sync().next_sync_after_s
        assert is_about(asked_s, 10.0) or is_about(asked_s, 180.0)  # 10 while the rollout runs
        wait_for("it is calm again", lambda: asked_about(device, 180.0))
        watch.cancel()
        wait_for("its end counts", lambda: asked_about(device, 10.0))


def test_a_device_at_rest_reports_often_while_a_rollout_runs(home, large):
    """Gates judge by metrics, which come with Sync."""
    with fleet(home, sync_interval_s=10.0, offline_after_s=45.0) as world:
        (device,) = online(world, 1)
        watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
        wait_for("the stream counts", lambda: asked_about(device, 180.0))
        other = world.device(site="other")
        other.sync()
        release = create_release(world)
        request = op.StartRolloutRequest(
            release=release, selector="site=other", spec=op.RolloutSpec(waves=[op.Wave(count=1)])
        )
        world.operator.StartRollout(request, timeout=WAIT_S)
        wait_for("it counts", lambda: asked_about(device, 10.0))
        watch.cancel()


def test_a_silent_device_with_an_open_stream_is_noticed_later_and_one_without_at_once(home, large):
    with fleet(home, sync_interval_s=0.2, offline_after_s=0.5) as world:
        stays, goes = online(world, 2)
        streams = [d.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S) for d in (stays, goes)]

        def status(device) -> str:
            return devices_by_id(world)[device.device_id].status

        for device in (stays, goes):
            wait_for("the stream counts", lambda d=device: d.sync().next_sync_after_s > 1.0)
        last_heard = time.monotonic()
        streams[1].cancel()
        wait_for("one is missed", lambda: status(goes) == "offline")
        if time.monotonic() - last_heard < 3.0:  # a busy machine proves nothing here
            assert status(stays) == "online"
        wait_for("the other is missed as well", lambda: status(stays) == "offline")
        assert time.monotonic() - last_heard > 2.5
        streams[0].cancel()


def test_a_device_is_poked_when_its_labels_change(world, large):
    (device,) = online(world, 1)
    watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
    wait_for("the stream counts", lambda: device.sync().next_sync_after_s > 0.5)
    request = op.LabelDeviceRequest(device_id=device.device_id, set={"site": "oslo"})
    world.operator.LabelDevice(request, timeout=WAIT_S)
    next(watch)
    watch.cancel()


def test_a_second_watch_of_a_device_ends_the_first(world):
    (device,) = online(world, 1)
    start(world, create_release(world))
    wait_for("it is assigned", lambda: device.sync() and device.generation == 1)
    first = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
    next(first)
    second = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
    next(second)
    assert list(first) == []
    second.cancel()


@pytest.mark.parametrize(
    "bad",
    [
        {"events": [cp.DeviceEvent(seq=n, name="e") for n in range(1001)]},
        {"metrics": [cp.Metric(name="m")] * 1001},
    ],
)
def test_a_sync_with_too_much_is_refused_and_the_next_works(world, bad):
    (device,) = online(world, 1)
    assert isinstance(refused(device.fleet.Sync, device.request(**bad)), errors.InvalidInput)
    device.sync()


def test_labels_come_from_token_device_and_operator_in_that_order_of_weight(world):
    device = world.device(site="berlin")
    device.labels = {"site": "paris", "gpu": "orin"}
    device.sync()
    assert devices_by_id(world)[device.device_id].labels == {"site": "berlin", "gpu": "orin"}
    change = op.LabelDeviceRequest(device_id=device.device_id, set={"gpu": "thor"}, remove=["site"])
    assert world.operator.LabelDevice(change, timeout=WAIT_S).labels == {
        "site": "paris",
        "gpu": "thor",
    }
    remove = op.LabelDeviceRequest(device_id=device.device_id, remove=["site"])
    assert "agent.toml" in str(refused(world.operator.LabelDevice, remove))
    bad = op.LabelDeviceRequest(device_id=device.device_id, set={"a b": "c"})
    assert isinstance(refused(world.operator.LabelDevice, bad), errors.InvalidInput)


@pytest.mark.parametrize(
    ("before", "after", "is_news"),
    [
        (100 << 30, (100 << 30) - (1 << 20), False),
        (100 << 30, 99 << 30, True),
        (1, 60 << 20, True),
        (8 << 20, 5 << 20, True),
        (8 << 20, 7 << 20, False),
        (0, 1, True),
        (0, 0, False),
    ],
)
def test_free_disk_space_is_stored_when_a_plan_could_notice(world, before, after, is_news):
    (device,) = online(world, 1)
    device.facts.disk_free_bytes = before
    device.sync()
    device.facts.disk_free_bytes = after
    device.sync()
    stored = world.controller.controller._store.device(device.device_id)
    assert stored.facts.disk_free_bytes == (after if is_news else before)


def test_what_lies_on_a_devices_disk_is_told_once_and_asked_for_when_it_is_not_known(world):
    (device,) = online(world, 1)
    kept, loose = bytes(32), bytes([1]) * 32
    held = cp.HeldArtifacts(kept=[kept], loose=[loose])
    fingerprint = held_of(held).fingerprint
    assert device.sync(held_fingerprint=fingerprint).wants_held, "it was never told"
    assert not device.sync(held_fingerprint=fingerprint, held=held).wants_held
    assert not device.sync(held_fingerprint=fingerprint).wants_held
    store = world.controller.controller._store
    assert store.device(device.device_id).held == held_of(held)
    assert device.sync(held_fingerprint=fingerprint + 1).wants_held, "something changed"
    device.sync()  # an older agent: nothing is known any more
    assert store.device(device.device_id).held == Held()


@pytest.mark.parametrize(
    "held", [cp.HeldArtifacts(kept=[bytes(31)]), cp.HeldArtifacts(loose=[bytes(32)] * 257)]
)
def test_a_device_that_tells_of_too_much_or_nonsense_is_refused(world, held):
    (device,) = online(world, 1)
    assert isinstance(refused(device.fleet.Sync, device.request(held=held)), errors.RequestInvalid)


def test_telling_of_the_disk_costs_nine_bytes_at_rest(world):
    (device,) = online(world, 1)
    plain = device.request().ByteSize()
    device.seq -= 1
    assert device.request(held_fingerprint=(1 << 64) - 1).ByteSize() - plain <= 10
