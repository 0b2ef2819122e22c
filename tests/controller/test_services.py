"""The whole controller through its ports: real servers, real mTLS, real stubs."""

from __future__ import annotations

import math
import time

import grpc
import pytest

from remora_contract import errors
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.rpc import from_rpc_error
from remora_controller.services.fleet import watched_interval_s
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.control.v1 import control_pb2_grpc as cp_grpc
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller import artifacts
from tests.controller.harness import WAIT_S, Fleet, fleet, make_home, wait_for


@pytest.fixture
def home(tmp_path):
    return make_home(tmp_path / "controller")


@pytest.fixture
def world(home):
    with fleet(home) as made:
        yield made


def create_release(world: Fleet, name: str = "first", revision: str = "1") -> str:
    bundle = artifacts.bundle(world.home.repository)
    adapter = artifacts.adapter(world.home.repository, revision=revision)
    document = canonical_json(artifacts.release(name, bundle, adapter))
    request = op.CreateReleaseRequest(release_json=document)
    return world.operator.CreateRelease(request, timeout=WAIT_S).release_id


def start(world: Fleet, release: str, **more: object) -> str:
    request = op.StartRolloutRequest(release=release, **more)
    return world.operator.StartRollout(request, timeout=WAIT_S).rollout_id


def refused(call, *arguments, **named) -> errors.RemoraError:
    with pytest.raises(grpc.RpcError) as e:
        call(*arguments, **named, timeout=WAIT_S)
    return from_rpc_error(e.value)


def online(world: Fleet, count: int, **labels: str):
    devices = [world.device(**labels) for _ in range(count)]
    for device in devices:
        device.sync()
    return devices


def devices_by_id(world: Fleet) -> dict[str, op.Device]:
    found = world.operator.ListDevices(op.ListDevicesRequest(), timeout=WAIT_S).devices
    return {d.device_id: d for d in found}


# -- rollouts ------------------------------------------------------------------------------


def test_a_release_reaches_every_device_wave_by_wave(world):
    devices = online(world, 3)
    done = world.drive(start(world, create_release(world)), devices, "COMPLETED", "ROLLED_BACK")
    assert (done.state, done.reason) == ("COMPLETED", "3 succeeded")
    assert {d.outcome for d in done.devices} == {"succeeded"}
    assert [d.wave for d in done.devices] == [1, 2, 2]
    assert all(d.running == done.release_id for d in devices)


def test_a_bad_release_stops_by_itself_and_all_return_to_the_last_good_one(world):
    devices = online(world, 4)
    good = create_release(world, "good")
    world.drive(start(world, good), devices, "COMPLETED")
    bad = create_release(world, "bad", revision="2")
    rollout_id = start(world, bad)
    order = [d.device_id for d in world.rollout(rollout_id).devices]
    by_id = {d.device_id: d for d in devices}
    by_id[order[1]].bad_releases = {bad}
    done = world.drive(rollout_id, devices, "ROLLED_BACK", "COMPLETED")
    assert done.state == "ROLLED_BACK"
    assert all(d.running == good for d in devices)
    assert {d.outcome for d in done.devices} <= {"reverted", "waiting"}
    assert "failed; 100% had to succeed; " in done.reason
    errors_ = {d.device_id: d.error for d in done.devices}
    assert errors_[order[1]] == "Unhealthy: the engine failed 3 times", "also after the way back"
    assert errors_[order[0]] == ""
    assert by_id[order[0]].desired.is_rollback


def test_a_bad_first_release_ends_with_words_where_there_is_no_way_back(world):
    devices = online(world, 2)
    bad = create_release(world, "bad")
    rollout_id = start(world, bad)
    order = [d.device_id for d in world.rollout(rollout_id).devices]
    by_id = {d.device_id: d for d in devices}
    by_id[order[1]].bad_releases = {bad}
    done = world.drive(rollout_id, devices, "ROLLED_BACK", "COMPLETED")
    assert done.state == "ROLLED_BACK"
    assert "2 had no earlier release to return to" in done.reason
    assert {(d.outcome, d.phase) for d in done.devices} == {("kept", "UNASSIGNED")}
    assert all("no earlier release to return to" in d.error for d in done.devices)
    assert by_id[order[0]].running == bad, "it serves on"
    assert devices_by_id(world)[order[0]].assigned_release_id == ""


def test_the_release_it_kept_is_what_a_device_goes_back_to_next_time(world):
    (device,) = online(world, 1)
    first = create_release(world, "first")
    rollout_id = start(world, first)
    world.drive(rollout_id, [device], "COMPLETED")
    second = start(world, create_release(world, "second", revision="2"))
    world.operator.AbortRollout(op.AbortRolloutRequest(rollout_id=second))
    world.drive(second, [device], "ABORTED")
    assert device.running == first


def test_only_devices_of_the_selector_are_touched(world):
    inside, outside = online(world, 2, site="berlin"), online(world, 2, site="paris")
    rollout_id = start(world, create_release(world), selector="site=berlin")
    world.drive(rollout_id, inside + outside, "COMPLETED")
    assert all(d.running for d in inside)
    assert all(d.generation == 0 for d in outside)


def test_a_device_that_joins_later_gets_the_newest_completed_release(world):
    first = online(world, 1)
    release = create_release(world)
    world.drive(start(world, release), first, "COMPLETED")
    (late,) = online(world, 1)
    wait_for("the late device is assigned", lambda: late.sync() and late.generation > 0)
    late.settle()
    assert late.running == release


def test_an_offline_device_does_not_block_and_follows_when_it_returns(home):
    with fleet(home, sync_interval_s=0.05, offline_after_s=0.6) as world:
        here, away = online(world, 2)
        wait_for(
            "one device is offline",
            lambda: here.sync() and devices_by_id(world)[away.device_id].status == "offline",
        )
        release = create_release(world)
        done = world.drive(start(world, release), [here], "COMPLETED")
        assert "1 offline" in done.reason
        assert {d.outcome for d in done.devices} == {"succeeded", "offline"}
        wait_for("the other follows", lambda: away.settle() or away.running == release)


def test_a_device_that_returns_by_its_stream_first_follows_too(home):
    """The stream makes it count as online, so that its Sync tells no news."""
    with fleet(home, sync_interval_s=0.05, offline_after_s=0.6) as world:
        here, away = online(world, 2)
        wait_for(
            "one device is offline",
            lambda: here.sync() and devices_by_id(world)[away.device_id].status == "offline",
        )
        release = create_release(world)
        world.drive(start(world, release), [here], "COMPLETED")
        watch = away.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
        assert next(watch).generation == 1, "it is assigned without a Sync, and poked"
        away.settle()
        assert away.running == release
        watch.cancel()


def test_pause_holds_resume_goes_on(world):
    devices = online(world, 2)
    rollout_id = start(world, create_release(world))
    action = op.RolloutActionRequest(rollout_id=rollout_id)
    assert world.operator.PauseRollout(action, timeout=WAIT_S).state == "PAUSED"
    for device in devices:
        device.settle()
    assert sum(bool(d.running) for d in devices) <= 1
    assert world.rollout(rollout_id).state == "PAUSED"
    error = refused(world.operator.PauseRollout, action)
    assert isinstance(error, errors.Refused)
    assert "you can resume or abort it" in str(error)
    world.operator.ResumeRollout(action, timeout=WAIT_S)
    world.drive(rollout_id, devices, "COMPLETED")


@pytest.mark.parametrize("keep", [False, True])
def test_abort_returns_devices_or_keeps_them(world, keep):
    devices = online(world, 2)
    good = create_release(world, "good")
    world.drive(start(world, good), devices, "COMPLETED")
    new = create_release(world, "new", revision="2")
    rollout_id = start(world, new)
    by_id = {d.device_id: d for d in devices}
    first, second = (by_id[d.device_id] for d in world.rollout(rollout_id).devices)
    wait_for("the first wave is assigned", lambda: first.sync() and first.generation == 2)
    world.operator.AbortRollout(
        op.AbortRolloutRequest(rollout_id=rollout_id, keep=keep), timeout=WAIT_S
    )
    world.drive(rollout_id, devices, "ABORTED")
    assert first.running == (new if keep else good)
    assert second.generation == 1


@pytest.mark.parametrize(
    "spec",
    [
        op.RolloutSpec(wave_timeout_s=math.inf),
        op.RolloutSpec(soak_s=math.nan),
        op.RolloutSpec(soak_s=1e9),
        op.RolloutSpec(success_threshold=math.nan),
        op.RolloutSpec(waves=[op.Wave(percent=math.nan)]),
    ],
)
def test_a_rollout_of_absurd_numbers_is_refused_before_it_is_stored(world, spec):
    """A stored one could never be read again: the controller would not even start."""
    online(world, 1)
    release = create_release(world)
    request = op.StartRolloutRequest(release=release, spec=spec)
    assert isinstance(refused(world.operator.StartRollout, request), errors.RequestInvalid)
    assert not world.operator.ListRollouts(op.ListRolloutsRequest()).rollouts


def test_overlapping_rollouts_are_refused_or_superseded(world):
    devices = online(world, 2)
    first = start(world, create_release(world))
    second = create_release(world, "second", revision="2")
    error = refused(world.operator.StartRollout, op.StartRolloutRequest(release=second))
    assert isinstance(error, errors.Conflict)
    assert "--supersede" in str(error)
    rollout_id = start(world, second, supersede=True)
    assert world.rollout(first).state == "SUPERSEDED"
    world.drive(rollout_id, devices, "COMPLETED")
    assert all(d.running == second for d in devices)


def test_plan_shows_that_an_adapter_ships_alone(world):
    (device,) = online(world, 1)
    bundle = artifacts.bundle(world.home.repository)
    device.bundle_digest = bundle.digest
    device.sync()
    release = create_release(world)
    plan = world.operator.Plan(op.PlanRequest(release=release), timeout=WAIT_S)
    assert 0 < plan.total_bytes < bundle.bytes
    assert not plan.devices[0].builds_engine
    assert list(plan.waves) == ["wave 1: 1 devices"]


def test_devices_the_plan_refuses_stop_the_start_unless_left_out(world):
    good, small = online(world, 2)
    small.facts = cp.DeviceFacts(hostname="bench", disk_free_bytes=10)
    small.sync()
    release = create_release(world)
    error = refused(world.operator.StartRollout, op.StartRolloutRequest(release=release))
    assert isinstance(error, errors.Refused)
    assert small.device_id in str(error) and "disk" in str(error)
    done = world.drive(start(world, release, skip_refused=True), [good, small], "COMPLETED")
    assert [d.device_id for d in done.devices] == [good.device_id]


def test_a_release_of_unpublished_or_foreign_artifacts_is_refused(world):
    bundle = artifacts.bundle(world.home.repository)
    missing = artifacts.release("r", bundle).__class__(1, "r", digest_bytes(b"nowhere"))
    request = op.CreateReleaseRequest(release_json=canonical_json(missing))
    assert isinstance(refused(world.operator.CreateRelease, request), errors.NotFound)
    foreign = artifacts.adapter(world.home.repository, "foreign", base=digest_bytes(b"other"))
    request.release_json = canonical_json(artifacts.release("r", bundle, foreign))
    error = refused(world.operator.CreateRelease, request)
    assert isinstance(error, errors.Refused)
    assert "adapter_base" in str(error)
    request.release_json = b'{"name": "r"}'
    assert "missing key" in str(refused(world.operator.CreateRelease, request))


def test_starting_nothing_on_nobody_says_what_is_missing(world):
    start_request = op.StartRolloutRequest(release="nothing")
    assert "remora releases" in str(refused(world.operator.StartRollout, start_request))
    start_request.release = create_release(world)
    assert "remora devices token" in str(refused(world.operator.StartRollout, start_request))
    online(world, 1)
    start_request.selector = "site=nowhere"
    assert "no device matches" in str(refused(world.operator.StartRollout, start_request))
    start_request.selector = "((("
    error = refused(world.operator.StartRollout, start_request)
    assert isinstance(error, errors.InvalidInput)


# -- Sync and Watch ------------------------------------------------------------------------


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


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device counts as a large fleet."""
    monkeypatch.setattr("remora_controller.services.fleet.CALM_SYNCS_PER_S", 1e-3)


def test_a_device_that_can_be_poked_is_asked_to_sync_less_often(home, large):
    with fleet(home, sync_interval_s=10.0, offline_after_s=45.0) as world:
        (device,) = online(world, 1)
        assert device.sync().next_sync_after_s == 10.0
        watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
        wait_for("the stream counts", lambda: device.sync().next_sync_after_s == 180.0)
        start(world, create_release(world))
        next(watch)
        assert device.sync().next_sync_after_s == 2.0
        device.phase = "COMMITTED"
        assert device.sync().next_sync_after_s in (10.0, 180.0)  # 10 while the rollout runs
        wait_for("it is calm again", lambda: device.sync().next_sync_after_s == 180.0)
        watch.cancel()
        wait_for("its end counts", lambda: device.sync().next_sync_after_s == 10.0)


def test_a_device_at_rest_reports_often_while_a_rollout_runs(home, large):
    """Gates judge by metrics, which come with Sync."""
    with fleet(home, sync_interval_s=10.0, offline_after_s=45.0) as world:
        (device,) = online(world, 1)
        watch = device.fleet.Watch(cp.WatchRequest(), timeout=WAIT_S)
        wait_for("the stream counts", lambda: device.sync().next_sync_after_s == 180.0)
        other = world.device(site="other")
        other.sync()
        release = create_release(world)
        request = op.StartRolloutRequest(
            release=release, selector="site=other", spec=op.RolloutSpec(waves=[op.Wave(count=1)])
        )
        world.operator.StartRollout(request, timeout=WAIT_S)
        wait_for("it counts", lambda: device.sync().next_sync_after_s == 10.0)
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
        assert time.monotonic() - last_heard > 3.0
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


# -- artifacts -----------------------------------------------------------------------------


@pytest.fixture
def published(world):
    chunks = [bytes(range(256)) * 4096, b"tail"]  # 1 MiB and a little
    return artifacts.publish(world.home.repository, "bundle", "big", "1", chunks), chunks


def fetch(device, digest: str, offset: int = 0, length: int = 0) -> list[bytes]:
    request = cp.FetchRequest(chunk_digest=digest, offset=offset, length=length)
    stub = cp_grpc.ArtifactsStub(device.channel)
    return [message.data for message in stub.Fetch(request, timeout=WAIT_S)]


def test_a_chunk_arrives_whole_in_small_messages(world, published):
    _, chunks = published
    parts = fetch(world.device(), digest_bytes(chunks[0]))
    assert b"".join(parts) == chunks[0]
    assert max(map(len, parts)) <= 256 << 10


@pytest.mark.parametrize(("offset", "length"), [(1000, 0), (0, 10), (777_777, 4), (1 << 20, 0)])
def test_any_range_of_a_chunk_can_be_asked_for(world, published, offset, length):
    _, chunks = published
    expected = chunks[0][offset : offset + length if length else None]
    assert b"".join(fetch(world.device(), digest_bytes(chunks[0]), offset, length)) == expected


def test_a_manifest_comes_as_it_was_published(world, published):
    manifest, _ = published
    stub = cp_grpc.ArtifactsStub(world.device().channel)
    answer = stub.GetManifest(cp.GetManifestRequest(digest=manifest.digest), timeout=WAIT_S)
    assert answer.manifest_json == canonical_json(manifest)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (cp.FetchRequest(chunk_digest="../../ca.key"), errors.InvalidInput),
        (cp.FetchRequest(chunk_digest=digest_bytes(b"unpublished")), errors.NotFound),
        (cp.FetchRequest(chunk_digest=digest_bytes(b"tail"), offset=5), errors.InvalidInput),
        (cp.FetchRequest(chunk_digest=digest_bytes(b"tail"), length=9), errors.InvalidInput),
    ],
)
def test_only_published_bytes_can_be_asked_for(world, published, request_, error):
    stub = cp_grpc.ArtifactsStub(world.device().channel)
    with pytest.raises(grpc.RpcError) as e:
        list(stub.Fetch(request_, timeout=WAIT_S))
    assert isinstance(from_rpc_error(e.value), error)


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
