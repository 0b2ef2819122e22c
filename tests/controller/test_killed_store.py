"""The controller is killed before any of its writes, in the middle of a gated rollout, and starts
again from the file: it must end as if nothing had happened."""

from __future__ import annotations

import random

import pytest

from remora_contract.gates import Gate
from remora_controller.domain import RolloutState
from remora_controller.driver import RolloutDriver
from remora_controller.late_gates import LateState
from remora_controller.operations import Operations, StartRequest
from remora_controller.presence import Presence
from remora_controller.repository import Repository
from remora_controller.store.sqlite import SqliteStore
from tests.controller.gates.test_gated_rollouts import Measured
from tests.controller.gates.test_late_gates import LateWorld, leave
from tests.controller.test_scale import spec

GATE = Gate("speed", "avg(tokens_per_s) > 0.9 * baseline(tokens_per_s)", min_devices=2)
DEVICES = 4


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


class MortalStore(SqliteStore):
    """Dies before its n-th write; what was not committed is gone."""

    left: int | None = None

    def _mortal(self) -> None:
        if self.left is not None:
            if self.left == 0:
                raise Killed
            self.left -= 1

    def _write(self, sql, *arguments):
        self._mortal()
        return super()._write(sql, *arguments)

    def _write_many(self, sql, rows):
        self._mortal()
        super()._write_many(sql, rows)


class MortalWorld(Measured):
    def __init__(self, tmp_path) -> None:
        super().__init__(tmp_path, DEVICES)
        self.root = tmp_path
        self.rng = random.Random(11)
        self.restart()

    def restart(self) -> None:
        self.store.close()
        self.store = MortalStore(self.root / "controller.db")
        self.presence = Presence(self.now - 1000.0, 30.0)
        self.presence.load(self.store.devices(), self.store.latest_metrics())
        self.operations = Operations(
            self.store,
            Repository(self.root / "repository", lambda: self.now),
            self.presence,
            lambda: self.now,
            self.rng.randbytes,
        )
        self.driver = RolloutDriver(self.store, self.presence, self.operations.contents_of)
        self.hear()


def forward(world: MortalWorld, release: str) -> list[str]:
    return [
        row["device_id"]
        for row in world.store._rows(
            "SELECT device_id FROM assignments WHERE release_id = ? AND is_rollback = 0", release
        )
    ]


def run(world: MortalWorld, rollout: str, kill_at: int | None) -> tuple[RolloutState, int]:
    """The state it ends in, and how many writes it took where nothing was killed."""
    budget = 1_000_000 if kill_at is None else kill_at
    world.store.left = budget
    for _ in range(400):
        try:
            world.round()
            world.measure()
        except Killed:
            world.restart()
            continue
        state = world.store.rollout(rollout).state
        if state.is_final or state is RolloutState.PAUSED:
            left = world.store.left
            return state, budget - left if left is not None else 0
    raise AssertionError("it never ends")


@pytest.fixture
def begun(tmp_path):
    made = MortalWorld(tmp_path)
    made.committed(tmp_path, "old")
    yield made
    made.store.left = None
    made.store.close()


def begin(world: MortalWorld, tmp_path, speed: float) -> tuple[str, str]:
    release = world.release(tmp_path, "new")
    world.speed[release] = speed
    return release, world.start(release, GATE, max_unavailable=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("speed", "wanted"), [(20.0, RolloutState.COMPLETED), (10.0, RolloutState.ROLLED_BACK)]
)
def test_killed_before_any_write_it_ends_as_if_nothing_had_happened(tmp_path, speed, wanted):
    def world(name: str) -> MortalWorld:
        folder = tmp_path / name
        folder.mkdir()
        made = MortalWorld(folder)
        made.committed(folder, "old")
        return made

    whole = world("whole")
    release, rollout = begin(whole, whole.root, speed)
    state, writes = run(whole, rollout, None)
    assert state is wanted
    touched = sorted(forward(whole, release))
    whole.store.close()
    assert writes > 20
    for kill_at in range(0, writes, 3):
        made = world(f"killed-{kill_at}")
        release, rollout = begin(made, made.root, speed)
        state, _ = run(made, rollout, kill_at)
        assert state is wanted, f"killed before write {kill_at}"
        assert sorted(forward(made, release)) == touched, "assigned twice, or not at all"
        made.store.close()


def test_a_kill_in_the_middle_of_a_decision_leaves_nothing_of_it(begun, tmp_path):
    _, rollout = begin(begun, tmp_path, 20.0)
    before = begun.store.rollout(rollout)
    begun.store.left = 3
    with pytest.raises(Killed):
        for _ in range(50):
            begun.round()
            begun.measure()
    begun.restart()
    after = begun.store.rollout(rollout)
    states = begun.store.member_states(rollout)
    assigned = [s for s in states if s.member.generation is not None]
    assert all(s.forward is not None for s in assigned), "a generation without its assignment"
    assert after.version >= before.version


def test_a_spec_of_an_older_controller_is_still_read(begun, tmp_path):
    release = begun.release(tmp_path, "plain")
    started = begun.operations.start(StartRequest(release, "", spec()), "op").record
    old = '{"waves":[{"count":1}],"soak_s":0.0,"success_threshold":1.0,"wave_timeout_s":500.0}'
    with begun.store._atomic():
        begun.store._write(
            "UPDATE rollouts SET spec = ? WHERE rollout_id = ?", old, started.rollout_id
        )
    assert begun.store.rollout(started.rollout_id).spec.gates == ()


class LateMortalWorld(MortalWorld, LateWorld):
    pass


def come_late(folder, speed_is_bad: bool, kill_at: int | None) -> tuple[LateMortalWorld, str, int]:
    """A world in which a device took a release late and was judged; the writes that took."""
    folder.mkdir()
    world = LateMortalWorld(folder)
    world.first = world.committed(folder, "old")
    late = world.ids[0]
    leave(world, late)
    rollout = world.complete(world.release(folder, "new"), GATE)
    world.slow_on = {late} if speed_is_bad else set()
    world.away.clear()
    budget = 1_000_000 if kill_at is None else kill_at
    world.store.left = budget
    writes = 0
    for _ in range(60):
        try:
            world.driver.check_late([late])
            world.rounds(1)
        except Killed:
            world.restart()
        if world.store.left is not None:
            writes = budget - world.store.left
    world.store.left = None
    return world, rollout, writes


@pytest.mark.slow
@pytest.mark.parametrize("is_bad", [True, False])
def test_a_late_device_is_judged_the_same_whichever_write_the_controller_dies_before(
    tmp_path, is_bad
):
    world, _, writes = come_late(tmp_path / "whole", is_bad, None)
    world.store.close()
    assert writes > 20
    wanted = LateState.SENT_BACK if is_bad else LateState.PASSED
    for kill_at in range(0, writes, 2):
        world, rollout, _ = come_late(tmp_path / f"killed-{kill_at}", is_bad, kill_at)
        (late,) = world.late(rollout)
        assert world.late(rollout) == {late: wanted}, f"killed before write {kill_at}"
        given = [
            (row["is_rollback"], row["release_id"])
            for row in world.store._rows(
                "SELECT * FROM assignments WHERE device_id = ? AND rollout_id = ?", late, rollout
            )
        ]
        new = world.store.rollout(rollout).release_id
        assert given == [(0, new), *([(1, world.first)] if is_bad else [])]
        events = [e for e in world.store.events(late, 50) if e.name == "device.late"]
        assert len(events) == 1, "told once"
        world.store.close()
