"""What holds for every rollout, whatever the fleet does."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from remora_contract.device_phase import Phase
from remora_contract.gates import Gate
from remora_controller.domain import RolloutSpec, RolloutState
from remora_controller.gates.judge import Outcome, Verdict
from remora_controller.phases import furthest
from remora_controller.rollout import Assign
from tests.controller.rollout_world import World, WorldDevice

SPECS = st.builds(
    RolloutSpec,
    soak_s=st.just(0.0),
    wave_timeout_s=st.just(100.0),
    success_threshold=st.sampled_from([0.3, 0.5, 0.9, 1.0]),
    max_unavailable=st.sampled_from([None, 1, 2, 3]),
)


GATES = st.sampled_from([Gate("p", "x < 1", on_fail="pause"), Gate("r", "x < 1")])
VERDICTS = st.builds(
    Verdict, GATES, st.integers(1, 3), st.sampled_from(Outcome), st.just("x = 2"), st.just(1)
)


@st.composite
def worlds(draw, always_online: bool = False, gated: bool = False) -> World:
    count = draw(st.integers(1, 12))
    waves = sorted(draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    numbers = {w: i for i, w in enumerate(sorted(set(waves)), start=1)}
    online = st.just(True) if always_online else st.booleans()
    devices = [
        WorldDevice(
            f"d{i}",
            numbers[wave],
            is_good=draw(st.booleans()),
            is_online=draw(online),
            has_old=draw(st.booleans()),
        )
        for i, wave in enumerate(waves)
    ]
    world = World(devices, draw(SPECS))
    if gated:
        world.verdicts = tuple(draw(st.lists(VERDICTS, max_size=4)))
    return world


SEEDS = st.integers(0, 1 << 32)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["step", "step", "step", "flip", "time", "bar", "abort", "keep"]),
        st.integers(0, 11),
    ),
    max_size=80,
)


def happen(world: World, kind: str, index: int) -> None:
    """Something the controller cannot choose."""
    ids = sorted(world.devices)
    device = world.devices[ids[index % len(ids)]]
    if kind == "step":
        world.step_device(device.device_id)
    elif kind == "flip":
        device.is_online = not device.is_online
    elif kind == "time":
        world.now += 30
    elif kind == "bar":
        device.is_eligible = False
    elif not world.state.is_final:
        world.state, world.keep, world.clock_at = RolloutState.ABORTING, kind == "keep", world.now


@given(worlds(), EVENTS)
def test_never_more_devices_change_at_once_than_allowed(world, events):
    limit = world.spec.max_unavailable
    assume(limit is not None)
    for kind, index in events:
        for action in world.decide():
            if isinstance(action, Assign) and not action.is_rollback:
                world.apply(action)
                overdue = world.now - world.spec.wave_timeout_s
                changing = [
                    d
                    for d in world.devices.values()
                    if d.forward and not d.forward.is_settled and d.forward.assigned_at > overdue
                    if d.is_eligible
                ]
                assert len(changing) <= limit
            else:
                world.apply(action)
        if kind != "flip":
            happen(world, kind, index)


@given(worlds(always_online=True))
def test_going_back_respects_the_same_limit(world):
    limit = world.spec.max_unavailable
    assume(limit is not None)
    for _ in range(300):
        before = world.changing()
        for action in world.decide():
            world.apply(action)
        assert world.changing() <= max(limit, before)
        moved = [world.step_device(d) for d in sorted(world.devices)]
        if not any(moved) and not world.decide():
            break


@given(worlds(gated=True), EVENTS)
def test_every_run_ends_whatever_happens_meanwhile(world, events):
    for kind, index in events:
        world.settle_decisions()
        happen(world, kind, index)
    world.run()
    assert world.state.is_final or world.state is RolloutState.PAUSED


@given(worlds(gated=True), EVENTS, st.booleans())
def test_after_an_abort_no_device_is_moved_forward(world, events, keep):
    for kind, index in events:
        world.settle_decisions()
        happen(world, kind, index)
    assume(not world.state.is_final)
    world.state, world.keep = RolloutState.ABORTING, keep
    touched = len(world.touched)
    world.run()
    assert all(a.is_rollback for a in world.touched[touched:])
    assert world.state is RolloutState.ABORTED
    if keep:
        assert len(world.touched) == touched


@given(worlds(gated=True), EVENTS)
def test_only_members_are_touched_and_only_in_waves_that_began(world, events):
    for kind, index in events:
        for action in world.decide():
            if isinstance(action, Assign):
                device = world.devices[action.device_id]
                assert device.wave <= world.wave
                assert device.is_eligible
            world.apply(action)
        happen(world, kind, index)


@given(worlds(always_online=True, gated=True))
def test_no_device_of_a_later_wave_is_touched_while_a_gate_does_not_pass(world):
    world.run()
    bad = [v.wave for v in world.verdicts if v.outcome is not Outcome.PASS]
    if bad:
        assert all(world.devices[a.device_id].wave <= min(bad) for a in world.touched)
        assert world.state is not RolloutState.COMPLETED or min(bad) > world.waves


@given(worlds(always_online=True, gated=True))
def test_going_back_wins_over_a_pause(world):
    world.settle_decisions()
    first = [v for v in world.verdicts if v.wave == 1 and v.outcome is Outcome.FAIL]
    if any(v.gate.on_fail == "rollback" for v in first):
        assert world.state is not RolloutState.PAUSED


@given(worlds())
def test_a_device_held_by_its_window_blocks_no_wave_for_ever(world):
    for device in world.devices.values():
        device.is_online = True
    held = sorted(world.devices)[0]
    for _ in range(400):
        world.settle_decisions()
        if world.state.is_final or world.state is RolloutState.PAUSED:
            break
        device = world.devices[held]
        device.unreported = [(g, p) for g, p in device.unreported if p is Phase.ADMITTED]
        if device.forward is not None and device.back is None:
            world.report(held, device.forward.generation, Phase.WAIT_WINDOW)
        moved = [world.step_device(d) for d in world.devices if d != held]
        if not any(moved):
            world.now += world.spec.wave_timeout_s / 2
    assert world.state.is_final or world.state is RolloutState.PAUSED


def expected_end(world: World) -> RolloutState:
    """What a fleet that is always online must end with: said without any rollout logic."""
    for wave in range(1, world.waves + 1):
        members = [d for d in world.devices.values() if d.wave == wave]
        good = sum(d.is_good for d in members)
        if good < world.spec.success_threshold * len(members) - 1e-9:
            return RolloutState.ROLLED_BACK
    return RolloutState.COMPLETED


@given(worlds(always_online=True), SEEDS)
def test_reports_in_any_order_with_duplicates_end_the_same(world, seed):
    rng = random.Random(seed)
    expected, said = expected_end(world), []
    for _ in range(2000):
        world.settle_decisions()
        if world.state.is_final:
            break
        waiting = [d for d in world.devices.values() if d.unreported]
        device = rng.choice(waiting)
        at = rng.randrange(len(device.unreported))  # not necessarily the next one
        report = (device.device_id, *device.unreported.pop(at))
        said.append(report)
        world.report(*report)
        if rng.random() < 0.3:
            world.report(*rng.choice(said))
    assert world.state is expected


@given(worlds(always_online=True), SEEDS)
def test_a_crash_between_any_two_writes_loses_nothing(world, seed):
    rng = random.Random(seed)
    expected = expected_end(world)
    for _ in range(2000):
        actions = world.decide()
        for action in actions[: rng.randint(0, len(actions))]:
            world.apply(action)
        if world.state.is_final:
            break
        if rng.random() < 0.5:
            for device in world.devices:
                world.step_device(device)
    assert world.state is expected
    forward = [a.device_id for a in world.touched if not a.is_rollback]
    assert len(forward) == len(set(forward)), "a device was assigned twice"


PHASES = st.sampled_from(list(Phase))


@given(st.lists(PHASES, min_size=1, max_size=8), SEEDS)
def test_reports_of_one_generation_form_a_lattice(phases, seed):
    rng = random.Random(seed)

    def merged(order):
        known = None
        for phase in order:
            known = furthest(known, phase)
        return known

    shuffled = [*phases, *phases]
    rng.shuffle(shuffled)
    assert merged(shuffled) is merged(phases)


@settings(max_examples=20)
@given(worlds())
def test_a_decision_repeats_itself_until_it_is_carried_out(world):
    assert world.decide() == world.decide()
    view = world.view()
    assert replace(view) == view
