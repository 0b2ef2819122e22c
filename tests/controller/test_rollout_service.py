"""Rollouts through the whole controller: real servers, real mTLS, real stubs."""

from __future__ import annotations

import math

import pytest

from remora_contract import errors
from remora_contract.digests import canonical_json, digest_bytes
from remora_protos.control.v1 import control_pb2 as cp
from remora_protos.operator.v1 import operator_pb2 as op
from tests.controller import artifacts
from tests.controller.harness import WAIT_S, fleet, wait_for
from tests.controller.operating import create_release, devices_by_id, online, refused, start


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
