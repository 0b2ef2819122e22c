"""Hundreds of devices in one rollout, without sockets: the same driver and store as in service."""

from __future__ import annotations

import random

from remora_contract.digests import canonical_json
from remora_controller.domain import (
    BootTrail,
    Device,
    Facts,
    Report,
    RolloutSpec,
    RolloutState,
    SyncRecord,
    Wave,
)
from remora_controller.driver import RolloutDriver
from remora_controller.operations import Operations, StartRequest
from remora_controller.presence import Presence
from remora_controller.repository import Repository
from remora_controller.store.protocol import JoinTokenRecord
from remora_controller.store.sqlite import SqliteStore
from tests.controller import artifacts

COUNT = 300
PATH = ("STAGING", "SWITCHING", "SOAKING", "COMMITTED")
BAD_PATH = ("STAGING", "SWITCHING", "SOAKING", "REVERTED")


class Simulation:
    """Time is a number; every device walks one phase a round."""

    def __init__(self, tmp_path, count: int) -> None:
        self.now = 1000.0
        self.store = SqliteStore(tmp_path / "controller.db")
        self.presence = Presence(0.0, 30.0)
        rng = random.Random(7)
        self.operations = Operations(
            self.store,
            Repository(tmp_path / "repository", lambda: self.now),
            self.presence,
            lambda: self.now,
            rng.randbytes,
        )
        self.driver = RolloutDriver(self.store, self.presence, self.operations.contents_of)
        self.ids = [f"device-{n:03d}" for n in range(count)]
        self.broken: set[str] = set()
        for device_id in self.ids:
            token = JoinTokenRecord(device_id, {}, 0.0, 1e9, "op")
            self.store.add_join_token(token)
            facts = Facts(hostname=device_id)
            self.store.enrol(device_id, Device(device_id, 0.0, "key", facts), 0.0)
        self.hear()

    def hear(self) -> None:
        for device_id in self.ids:
            self.presence.seen(device_id, BootTrail("b", 1), self.now, is_stored=False)

    def release(self, tmp_path, name: str) -> str:
        repository = tmp_path / "repository"
        release = artifacts.release(name, artifacts.bundle(repository))
        return self.operations.create_release(canonical_json(release), "op").release_id

    def round(self) -> None:
        """One tick of the controller, one phase of every device, all in one batch."""
        self.now += 1.0
        self.hear()
        self.driver.tick(self.now)
        assignments = self.store.assignments()
        records = [
            self._record(a.device_id, a.generation, self._next(a.device_id, a))
            for a in assignments.values()
            if a.release_id is not None and (a.phase is None or a.phase.value in PATH[:-1])
        ]
        self.store.record_syncs(records)

    def _next(self, device_id: str, assignment) -> str:
        fails = device_id in self.broken and not assignment.is_rollback
        path = BAD_PATH if fails else PATH
        return path[0] if assignment.phase is None else path[path.index(assignment.phase.value) + 1]

    def _record(self, device_id: str, generation: int, phase: str) -> SyncRecord:
        report = Report(phase=phase, generation=generation)
        return SyncRecord(
            device_id, Facts(hostname=device_id), {}, report, BootTrail("b", 1), self.now
        )

    def run(self, rollout_id: str) -> RolloutState:
        for _ in range(300):
            self.round()
            state = self.operations.rollout(rollout_id).record.state
            if state.is_final:
                return state
        raise AssertionError("the rollout never ends")


def spec(**changes: object) -> RolloutSpec:
    waves = (Wave(count=1), Wave(percent=10.0), Wave(percent=50.0))
    return RolloutSpec(waves=waves, soak_s=0.0, wave_timeout_s=500.0, **changes)


def test_three_hundred_devices_complete_in_waves(tmp_path):
    world = Simulation(tmp_path, COUNT)
    request = StartRequest(world.release(tmp_path, "r"), "", spec(max_unavailable=50))
    rollout_id = world.operations.start(request, "op").record.rollout_id
    assert world.run(rollout_id) is RolloutState.COMPLETED
    detail = world.operations.rollout(rollout_id)
    sizes = [sum(m.wave == w for m in detail.view.members) for w in range(1, 5)]
    assert sizes == [1, 29, 120, 150]
    assert all(m.forward.phase.value == "COMMITTED" for m in detail.view.members)
    world.store.close()


def test_a_release_that_breaks_devices_is_stopped_before_most_of_the_fleet_sees_it(tmp_path):
    world = Simulation(tmp_path, COUNT)
    good = world.release(tmp_path, "good")
    first = world.operations.start(StartRequest(good, "", spec()), "op").record.rollout_id
    assert world.run(first) is RolloutState.COMPLETED
    bad = world.release(tmp_path, "bad")
    world.broken = set(random.Random(1).sample(world.ids, 100))
    started = world.operations.start(StartRequest(bad, "", spec(success_threshold=0.9)), "op")
    assert world.run(started.record.rollout_id) is RolloutState.ROLLED_BACK
    members = world.operations.rollout(started.record.rollout_id).view.members
    touched = [m for m in members if m.forward is not None]
    assert len(touched) <= 30
    assert all(m.last_good == good for m in touched)
    assert {a.release_id for a in world.store.assignments().values()} == {good}
    world.store.close()


def test_a_device_that_missed_a_rollout_is_found_by_the_next_process(tmp_path):
    """Who may be late is only in memory: a new driver must be able to look at everybody."""
    world = Simulation(tmp_path, 3)
    away = world.ids.pop()
    world.now += 60.0
    world.hear()
    release = world.release(tmp_path, "r")
    rollout_id = world.operations.start(StartRequest(release, "", spec()), "op").record.rollout_id
    assert world.run(rollout_id) is RolloutState.COMPLETED
    assert world.store.assignment(away) is None
    restarted = RolloutDriver(world.store, world.presence, world.operations.contents_of)
    restarted.check_late([*world.ids, away])
    assert [a.device_id for a in restarted.tick(world.now)] == [away]
    world.store.close()


def test_a_removed_repository_artifact_leaves_late_devices_out_and_says_so_once(tmp_path):
    world = Simulation(tmp_path, 2)
    release = world.release(tmp_path, "r")
    rollout_id = world.operations.start(StartRequest(release, "", spec()), "op").record.rollout_id
    assert world.run(rollout_id) is RolloutState.COMPLETED
    for path in (tmp_path / "repository" / "manifests").iterdir():
        path.unlink()
    world.store.add_join_token(JoinTokenRecord("late", {}, 0.0, 1e9, "op"))
    world.store.enrol("late", Device("late", 0.0, "key"), 0.0)
    for _ in range(3):
        world.now += 2
        world.driver.check_late(["late"])
        world.driver.tick(world.now)
    events = world.store.events("late", 10)
    assert [e.name for e in events] == ["device.left_out"]
    assert "remora-build publish" in events[0].detail_json
    assert world.store.assignment("late") is None
    world.store.close()
