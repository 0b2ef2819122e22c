"""Devices that take a release after its waves, through the driver and the store that serve: each
is judged alone, and goes back alone."""

from __future__ import annotations

import json

import pytest

from remora_contract.device_phase import Phase
from remora_contract.gates import Gate
from remora_controller.counters import Counters
from remora_controller.domain import BootTrail, Device, Facts, MetricPoint, RolloutState
from remora_controller.driver import RolloutDriver
from remora_controller.late_gates import LateState
from remora_controller.loop import DecisionLoop
from remora_controller.metrics import ControllerCollector
from remora_controller.notes import device_note
from remora_controller.operations import StartRequest
from remora_controller.presence import Presence
from remora_controller.store.protocol import JoinTokenRecord
from remora_controller.store_thread import StoreThread
from remora_controller.watchers import Watchers
from tests.controller.gates.test_gated_rollouts import SLOW, Measured
from tests.controller.test_scale import spec

FAST = Gate("fast", "avg(tokens_per_s) > 15")
FEW_FAIL = Gate("few", "failure_fraction < 0.4", min_devices=2)


class LateWorld(Measured):
    """One device is away while the rollout goes through; `slow_on` are slow with every release
    but the first."""

    def __init__(self, tmp_path, count: int = 6) -> None:
        self.slow_on: set[str] = set()
        self.away: set[str] = set()
        self.silent: set[str] = set()
        self.first = ""
        super().__init__(tmp_path, count)

    def hear(self) -> None:
        everybody, self.ids = self.ids, [d for d in self.ids if d not in self.away]
        super().hear()
        self.ids = everybody

    def measure(self) -> None:
        self.tokens += 100
        for device_id, assignment in self.store.assignments().items():
            if assignment.phase is not None and assignment.phase.value in ("SOAKING", "COMMITTED"):
                self.running[device_id] = assignment.release_id
        for device_id in sorted(set(self.ids) - self.away - self.silent):
            is_slow = device_id in self.slow_on and self.running.get(device_id) != self.first
            speed = 10.0 if is_slow else 20.0
            for name, value in (("completion_tokens_total", self.tokens), ("tokens_per_s", speed)):
                point = MetricPoint(device_id, name, value, self.now)
                self.presence.add_metrics(device_id, [point])
        self.store.add_metrics(self.presence.take_unsaved()[1])

    def complete(self, release: str, *gates: Gate, **changes: object) -> str:
        rollout = self.start(release, *gates, **changes)
        assert self.until_end(rollout) is RolloutState.COMPLETED
        return rollout

    def come(self, *device_ids: str, rounds: int = 40) -> None:
        self.away -= set(device_ids)
        self.driver.check_late(device_ids)
        self.rounds(rounds)

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.round()
            self.measure()

    def runs(self, device_id: str) -> str | None:
        return self.store.assignment(device_id).release_id

    def late(self, rollout: str) -> dict[str, LateState]:
        states = self.store.member_states(rollout)
        return {s.member.device_id: s.late for s in states if s.late is not None}

    def detail(self, rollout: str, device_id: str) -> str:
        (state,) = [s for s in self.store.member_states(rollout) if s.member.device_id == device_id]
        return state.late_detail


@pytest.fixture
def world(tmp_path):
    made = LateWorld(tmp_path)
    made.first = made.committed(tmp_path, "first")
    yield made
    made.store.close()


def gauge(world: LateWorld) -> dict[str, float]:
    """`remora_controller_late_devices`, as it is scraped."""
    counters, clock = Counters(), lambda: world.now
    parts = (world.store, StoreThread(), world.driver, world.presence, Watchers())
    DecisionLoop(*parts, counters, clock)._count()
    parts[1].close()
    (family,) = [
        f for f in ControllerCollector(counters).collect() if f.name.endswith("_late_devices")
    ]
    return {sample.labels["state"]: sample.value for sample in family.samples}


def leave(world: LateWorld, *device_ids: str) -> None:
    world.away |= set(device_ids)
    world.now += 60.0  # longer than it takes to count as gone
    world.hear()


def test_a_late_device_on_which_the_release_is_slow_goes_back_alone(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, SLOW)
    world.slow_on = {late}
    world.come(late)
    assert world.late(rollout) == {late: LateState.SENT_BACK}
    assert world.runs(late) == world.first
    newest = world.store.assignment(late)
    assert (newest.rollout_id, newest.is_rollback) == (rollout, True)
    assert {world.runs(d) for d in world.ids if d != late} == {new}, "nobody else is touched"
    assert world.store.rollout(rollout).state is RolloutState.COMPLETED
    assert "avg(tokens_per_s) = 10" in world.detail(rollout, late)
    assert gauge(world) == {"judging": 0.0, "sent_back": 1.0, "failed": 0.0, "inconclusive": 0.0}
    (event,) = [e for e in world.store.events(late, 50) if e.name == "device.late"]
    assert json.loads(event.detail_json)["state"] == "SENT_BACK"
    (flag,) = world.store.late_flags()
    note = device_note(world.store.device(late), {}, flag)
    assert note.startswith(f"sent back by a gate of rollout {rollout}: gate speed fails")


def test_it_is_not_given_the_release_again_when_it_returns_once_more(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    rollout = world.complete(world.release(tmp_path, "new"), SLOW)
    world.slow_on = {late}
    world.come(late)
    leave(world, late)
    before = world.store.assignment(late)
    world.come(late)
    assert world.store.assignment(late) == before
    assert world.late(rollout) == {late: LateState.SENT_BACK}


def test_a_late_device_on_which_it_is_as_fast_keeps_it(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, SLOW)
    world.come(late)
    assert world.late(rollout) == {late: LateState.PASSED}
    assert world.runs(late) == new
    assert world.store.late_flags() == [], "all is well"


def test_without_samples_it_is_never_taken_for_a_pass_and_said(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, FAST)
    world.silent = {late}
    world.come(late, rounds=400)
    assert world.late(rollout) == {late: LateState.JUDGING}
    world.rounds(150)
    assert world.late(rollout) == {late: LateState.INCONCLUSIVE}
    assert world.runs(late) == new, "as in a wave: it waits, keeps what it has and says so"
    assert "gate fast has 0 of 1 devices" in world.detail(rollout, late)
    assert [f.state for f in world.store.late_flags()] == [LateState.INCONCLUSIVE]


def test_a_gate_that_says_pause_leaves_it_there_for_an_operator(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, Gate("fast", FAST.check, on_fail="pause"))
    world.slow_on = {late}
    world.come(late)
    assert world.late(rollout) == {late: LateState.FAILED}
    assert world.runs(late) == new


def test_what_an_operator_accepted_of_the_last_wave_late_devices_may_be_too(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, FAST)
    with world.store._atomic():
        world.store._write("UPDATE rollouts SET accepted_wave = waves")
    world.slow_on = {late}
    world.come(late)
    assert world.late(rollout) == {late: LateState.PASSED}


def test_a_device_without_an_incumbent_is_not_compared_with_one(world, tmp_path):
    rollout = world.complete(world.release(tmp_path, "new"), SLOW, FAST)
    for name, speed in (("born", 20.0), ("born-slow", 10.0)):
        world.store.add_join_token(JoinTokenRecord(name, {}, 0.0, 1e9, "op"))
        world.store.enrol(name, Device(name, 0.0, "key", Facts(hostname=name)), world.now)
        world.ids.append(name)
        world.slow_on |= {name} if speed < 20 else set()
    world.come("born", "born-slow")
    assert world.late(rollout) == {"born": LateState.PASSED, "born-slow": LateState.SENT_BACK}
    assert world.runs("born-slow") is None, "there is nothing to go back to"
    assert "it keeps what it runs" in world.detail(rollout, "born-slow")


def test_what_was_assigned_meanwhile_wins_over_a_gate_that_fails(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    rollout = world.complete(world.release(tmp_path, "new"), SLOW)
    world.slow_on = {late}
    world.come(late, rounds=2)
    newer = world.release(tmp_path, "newer")
    world.operations.start(StartRequest(newer, f"id={late}", spec()), "op")
    world.rounds(40)
    assert world.late(rollout) == {late: LateState.OVERTAKEN}
    assert world.runs(late) == newer


def test_a_pinned_device_is_left_alone_whatever_its_gates_say(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, SLOW)
    world.slow_on = {late}
    world.come(late, rounds=2)
    world.store.set_pin(late, "on show")
    world.rounds(30)
    assert (world.runs(late), world.late(rollout)) == (new, {late: LateState.JUDGING})
    world.store.set_pin(late, None)
    world.rounds(5)
    assert world.runs(late) == world.first


def test_a_failure_fraction_over_late_devices_keeps_the_release_from_more_of_them(world, tmp_path):
    waiting = world.ids[:4]
    leave(world, *waiting)
    rollout = world.complete(world.release(tmp_path, "new"), FEW_FAIL)
    world.broken = set(waiting[:2])
    world.come(*waiting[:2])
    assert set(world.late(rollout).values()) == {LateState.UNDONE}
    world.come(*waiting[2:])
    assert {world.runs(d) for d in waiting[2:]} == {world.first}
    assert [e.name for e in world.store.events(waiting[2], 50)] == ["device.left_out"]
    assert "gate few fails" in world.store.events(waiting[2], 1)[0].detail_json


def test_one_failure_of_many_late_devices_touches_no_other(world, tmp_path):
    waiting = world.ids[:4]
    leave(world, *waiting)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, FEW_FAIL)
    world.broken = {waiting[0]}
    world.come(*waiting)
    assert {world.runs(d) for d in waiting[1:]} == {new}
    found = world.late(rollout)
    assert found.pop(waiting[0]) is LateState.UNDONE
    assert set(found.values()) == {LateState.PASSED}


def test_a_device_held_by_its_window_until_the_rollout_ended_is_judged_too(world, tmp_path):
    rollout = world.start(world.release(tmp_path, "new"), FAST)
    held = world.operations.rollout(rollout).view.members[-1].device_id
    with_window = world._next
    world._next = lambda d, a: "WAIT_WINDOW" if d == held else with_window(d, a)
    for _ in range(1500):
        world.round()
        world.measure()
        if world.store.rollout(rollout).state.is_final:
            break
    assert world.store.rollout(rollout).state is RolloutState.COMPLETED
    assert world.late(rollout) == {held: LateState.JUDGING}
    world.slow_on = {held}
    records = [
        world._record(held, world.store.assignment(held).generation, phase)
        for phase in ("SWITCHING", "SOAKING")
    ]
    world.store.record_syncs(records)
    world._next = with_window
    world.rounds(20)
    assert world.late(rollout) == {held: LateState.SENT_BACK}
    assert world.runs(held) == world.first


def speeds_before(world: LateWorld, rollout: str, device_id: str) -> tuple[float, ...]:
    (series,) = world.store.baselines(rollout, device_id)[device_id]["tokens_per_s"]
    return series.values


def test_a_late_device_s_baseline_grows_with_every_sync_until_it_is_whole(world, tmp_path):
    """It sends what it spooled oldest first, and each part may come long after the part before."""
    late = world.ids[0]
    leave(world, late)
    world.silent = {late}
    apart = world.now
    rollout = world.complete(world.release(tmp_path, "new"), SLOW)
    world.come(late, rounds=8)
    for part in ((1.0, 2.0), (3.0, 4.0, 5.0)):
        for second in part:
            world.tokens += 100
            for name, value in (("completion_tokens_total", world.tokens), ("tokens_per_s", 21.0)):
                world.presence.add_metrics(late, [MetricPoint(late, name, value, apart + second)])
        world.store.add_metrics(world.presence.take_unsaved()[1])
        for _ in range(30):
            world.round()
    assert speeds_before(world, rollout, late)[-5:] == (21.0,) * 5
    count = len(speeds_before(world, rollout, late))
    world.silent, world.slow_on = set(), {late}
    world.rounds(20)
    assert world.late(rollout) == {late: LateState.SENT_BACK}
    assert len(speeds_before(world, rollout, late)) == count


def test_history_is_read_once_for_a_device_and_of_a_few_at_a_look(world, tmp_path, monkeypatch):
    late = world.ids[:3]
    leave(world, *late)
    rollout = world.complete(world.release(tmp_path, "new"), Gate("fast", FAST.check, "pause"))
    monkeypatch.setattr("remora_controller.late_watch.FILLED_AT_ONCE", 2)
    read, samples = [], world.store.metric_samples

    def counting(names, since, device_ids=None):
        read.append(tuple(device_ids))
        return samples(names, since, device_ids)

    monkeypatch.setattr(world.store, "metric_samples", counting)
    world.silent = {late[2]}
    world.come(*late, rounds=60)
    assert read == [tuple(sorted(late)[:2]), tuple(sorted(late)[2:])]
    assert world.late(rollout)[late[2]] is LateState.JUDGING
    assert world.late(rollout)[late[0]] is world.late(rollout)[late[1]] is LateState.PASSED


def test_a_controller_that_starts_in_the_middle_decides_the_same(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    rollout = world.complete(world.release(tmp_path, "new"), SLOW)
    world.slow_on = {late}
    world.come(late, rounds=0)
    while world.store.assignment(late).phase is not Phase.SOAKING:
        world.rounds(1)
    assert world.late(rollout) == {late: LateState.JUDGING}
    seen = world.presence.sightings()
    world.presence = Presence(world.now - 3600.0, 30.0)
    for device_id in seen:
        world.presence.seen(device_id, BootTrail(), world.now, is_stored=True)
    world.driver = RolloutDriver(world.store, world.presence, world.operations.contents_of)
    world.rounds(20)
    assert world.late(rollout) == {late: LateState.SENT_BACK}


def test_a_device_that_stays_barred_is_judged_no_longer_than_a_wave(world, tmp_path):
    late = world.ids[0]
    leave(world, late)
    new = world.release(tmp_path, "new")
    rollout = world.complete(new, SLOW)
    world.slow_on = {late}
    world.come(late, rounds=0)
    while not world.driver.wants_samples(late) or world.driver.is_moving:
        world.round()
    world.store.set_pin(late, "on show")
    world.rounds(5)
    assert not world.driver.wants_samples(late), "nothing is asked of it"
    assert world.late(rollout) == {late: LateState.JUDGING}
    world.now += world.store.rollout(rollout).spec.wave_timeout_s
    world.rounds(2)
    assert world.late(rollout) == {late: LateState.INCONCLUSIVE}
    assert "pinned or quarantined" in world.detail(rollout, late)
    assert world.runs(late) == new


def test_what_a_device_is_newly_judged_by_comes_with_its_history(world):
    """By a later rollout's gates, while it was judged by another's until now."""
    device, watch = world.ids[0], world.driver._late_watch
    at = world.now - 100.0
    points = [MetricPoint(device, name, 7.0, at) for name in ("memory_used_bytes", "gpu_c")]
    world.store.add_metrics(points)
    for names in ({"memory_used_bytes"}, {"memory_used_bytes", "gpu_c"}):
        watch._fill({device: frozenset(names)})
        for name in names:
            (found,) = world.presence.samples.samples(device, name, 0.0, world.now)
            assert found.values == (7.0,)
