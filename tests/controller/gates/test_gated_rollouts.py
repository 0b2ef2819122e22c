"""Rollouts with gates, through the driver and the store that serve: samples in, decisions out."""

from __future__ import annotations

import pytest

from remora_contract.device_phase import Phase
from remora_contract.gates import Gate
from remora_controller.domain import MetricPoint, RolloutState
from remora_controller.driver import RolloutDriver
from remora_controller.operations import StartRequest
from remora_controller.presence import Presence
from remora_controller.transitions import Request
from tests.controller.test_scale import Simulation, spec

SLOW = Gate("speed", "avg(tokens_per_s) > 0.9 * baseline(tokens_per_s)", min_devices=2)


class Measured(Simulation):
    """Devices that also report how fast they are: `speed` by the release that serves."""

    def __init__(self, tmp_path, count: int = 6) -> None:
        super().__init__(tmp_path, count)
        self.speed: dict[str, float] = {}
        self.tokens = 0.0
        self.running: dict[str, str] = {}

    def measure(self) -> None:
        self.tokens += 100
        points = []
        for device_id, assignment in self.store.assignments().items():
            if assignment.phase in (Phase.SOAKING, Phase.COMMITTED):
                self.running[device_id] = assignment.release_id
        for device_id in self.ids:
            speed = self.speed.get(self.running.get(device_id, ""), 20.0)
            points += [
                MetricPoint(device_id, "completion_tokens_total", self.tokens, self.now),
                MetricPoint(device_id, "tokens_per_s", speed, self.now),
            ]
        for point in points:
            self.presence.add_metrics(point.device_id, [point])
        self.store.add_metrics(self.presence.take_unsaved()[1])

    def until_end(self, rollout_id: str, rounds: int = 400) -> RolloutState:
        for _ in range(rounds):
            self.round()
            self.measure()
            state = self.store.rollout(rollout_id).state
            if state.is_final or state is RolloutState.PAUSED:
                return state
        raise AssertionError("it never ends")

    def committed(self, tmp_path, name: str = "good") -> str:
        release = self.release(tmp_path, name)
        started = self.operations.start(StartRequest(release, "", spec()), "op")
        assert self.until_end(started.record.rollout_id) is RolloutState.COMPLETED
        for _ in range(5):
            self.now += 10
            self.hear()
            self.measure()
        return release

    def start(self, release: str, *gates: Gate, **changes: object) -> str:
        request = StartRequest(release, "", spec(gates=gates, **changes))
        return self.operations.start(request, "op").record.rollout_id


@pytest.fixture
def world(tmp_path):
    made = Measured(tmp_path)
    yield made
    made.store.close()


def test_a_slow_release_is_caught_and_every_device_goes_back(world, tmp_path):
    good = world.committed(tmp_path)
    slow = world.release(tmp_path, "slow")
    world.speed[slow] = 10.0
    rollout = world.start(slow, SLOW)
    assert world.until_end(rollout) is RolloutState.ROLLED_BACK
    record = world.store.rollout(rollout)
    assert "gate speed fails on wave 1" in record.reason
    assert "avg(tokens_per_s) = 10" in record.reason
    assert {a.release_id for a in world.store.assignments().values()} == {good}
    members = world.operations.rollout(rollout).view.members
    assert all(m.forward is None for m in members if m.wave > 1)


def test_a_release_as_fast_as_the_incumbent_completes(world, tmp_path):
    world.committed(tmp_path)
    rollout = world.start(world.release(tmp_path, "same"), SLOW)
    world.round()
    verdicts = world.operations.rollout(rollout).view.verdicts
    assert [v.outcome.value for v in verdicts] == ["INCONCLUSIVE"]
    assert world.until_end(rollout) is RolloutState.COMPLETED


def test_a_gate_that_pauses_waits_for_an_operator_who_may_accept_it(world, tmp_path):
    world.committed(tmp_path)
    slow = world.release(tmp_path, "slow")
    world.speed[slow] = 10.0
    rollout = world.start(slow, Gate("speed", SLOW.check, on_fail="pause"))
    assert world.until_end(rollout) is RolloutState.PAUSED
    world.operations.request(rollout, Request.RESUME, "op")
    assert world.until_end(rollout) is RolloutState.PAUSED, "it fails again"
    world.operations.request(rollout, Request.RESUME, "op", accept_gates=True)
    assert world.until_end(rollout) is RolloutState.PAUSED
    record = world.store.rollout(rollout)
    assert record.wave == record.accepted_wave + 1, "later waves are judged again"


def test_idle_devices_are_no_evidence_and_the_rollout_pauses(world, tmp_path):
    world.committed(tmp_path)
    rollout = world.start(world.release(tmp_path, "idle"), SLOW)
    for _ in range(600):
        world.round()
        if world.store.rollout(rollout).state is not RolloutState.RUNNING:
            break
    record = world.store.rollout(rollout)
    assert record.state is RolloutState.PAUSED
    assert record.reason.startswith("inconclusive: wave 1: gate speed has 0 of ")


def test_another_controller_process_judges_by_the_same_samples(world, tmp_path):
    world.committed(tmp_path)
    slow = world.release(tmp_path, "slow")
    world.speed[slow] = 10.0
    rollout = world.start(slow, SLOW)
    for _ in range(5):
        world.round()
        world.measure()
    world.presence = Presence(world.now - 1000, 30.0)
    world.driver = RolloutDriver(world.store, world.presence, world.operations.contents_of)
    world.hear()
    assert world.until_end(rollout) is RolloutState.ROLLED_BACK
    assert "gate speed fails" in world.store.rollout(rollout).reason


def test_a_retry_is_a_new_attempt_with_the_same_options(world, tmp_path):
    world.committed(tmp_path)
    slow = world.release(tmp_path, "slow")
    world.speed[slow] = 10.0
    first = world.start(slow, SLOW)
    assert world.until_end(first) is RolloutState.ROLLED_BACK
    world.speed.clear()
    again = world.operations.retry(first, "op", skip_refused=False, supersede=False).record
    assert (again.retry_of, again.attempt, again.spec.gates) == (first, 2, (SLOW,))
    assert world.until_end(again.rollout_id) is RolloutState.COMPLETED


def test_nothing_is_touched_before_its_time(world, tmp_path):
    world.committed(tmp_path)
    release = world.release(tmp_path, "later")
    rollout = world.start(release, not_before=world.now + 20)
    for _ in range(10):
        world.round()
    members = world.operations.rollout(rollout).view.members
    assert all(m.forward is None for m in members)
    assert world.until_end(rollout) is RolloutState.COMPLETED


def test_a_wave_that_is_away_as_a_whole_is_not_waited_for(world, tmp_path):
    """Who is online goes first, so the last wave of many a fleet is of devices that are not."""
    world.committed(tmp_path)
    rollout = world.start(world.release(tmp_path, "new"), SLOW)
    members = world.operations.rollout(rollout).view.members
    last = {m.device_id for m in members if m.wave == members[-1].wave}
    assert 0 < len(last) < len(members)
    heard, world.now = world.ids, world.now + 60.0
    world.ids = [d for d in heard if d not in last]
    world.hear()
    assert world.until_end(rollout) is RolloutState.COMPLETED
    assert f"{len(last)} offline" in world.store.rollout(rollout).reason


def test_samples_that_are_not_stored_yet_when_a_rollout_starts_are_its_baseline(world, tmp_path):
    release = world.release(tmp_path, "good")
    first = world.operations.start(StartRequest(release, "", spec()), "op").record.rollout_id
    assert world.run(first) is RolloutState.COMPLETED
    for n in range(4):  # as they come, between two flushes
        for d in world.ids:
            at = world.now - 4.0 + n
            points = [("completion_tokens_total", float(n)), ("tokens_per_s", 20.0)]
            world.presence.add_metrics(d, [MetricPoint(d, k, v, at) for k, v in points])
    slow = world.release(tmp_path, "slow")
    world.speed[slow] = 10.0
    rollout = world.start(slow, SLOW)
    world.tokens = 100.0
    assert world.until_end(rollout) is RolloutState.ROLLED_BACK


def test_a_baseline_that_devices_send_only_after_they_were_assigned_counts(world, tmp_path):
    """A device at rest tells of minutes at once: here, all of them with its first busy Sync."""
    release = world.release(tmp_path, "good")
    first = world.operations.start(StartRequest(release, "", spec()), "op").record.rollout_id
    assert world.run(first) is RolloutState.COMPLETED
    held = []
    for n in range(6):
        at = world.now - 60.0 + 10.0 * n
        for d in world.ids:
            held.append(MetricPoint(d, "completion_tokens_total", float(n), at))
            held.append(MetricPoint(d, "tokens_per_s", 20.0, at))
    slow = world.release(tmp_path, "slow")
    world.speed[slow] = 10.0
    rollout = world.start(slow, SLOW)
    world.round()
    assert any(a.rollout_id == rollout for a in world.store.assignments().values())
    for point in held:
        world.presence.add_metrics(point.device_id, [point])
    world.tokens = 100.0
    assert world.until_end(rollout) is RolloutState.ROLLED_BACK
