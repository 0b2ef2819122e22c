"""What holds for every device that takes a release after its waves."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from remora_contract.device_phase import FINAL, Phase
from remora_contract.gates import Gate
from remora_controller.gates.judge import Outcome, Verdict
from remora_controller.late_gates import (
    EndLate,
    LateState,
    LateView,
    SendBack,
    group_of,
    judge_late,
)
from remora_controller.phases import furthest
from remora_controller.rollout import Attempt
from tests.controller.rollout_world import BAD, GOOD

TIMEOUT_S = 100.0
GATES = st.sampled_from([Gate("p", "x < 1", on_fail="pause"), Gate("r", "x < 1")])
VERDICTS = st.lists(
    st.builds(Verdict, GATES, st.just(1), st.sampled_from(Outcome), st.just("x = 2"), st.just(1)),
    max_size=4,
)
SERVES = (Phase.SOAKING, Phase.COMMITTED)
# Of a generation that a rollout gave forward: UNASSIGNED is the answer to being given nothing.
PHASES = st.sampled_from([p for p in Phase if p is not Phase.UNASSIGNED])


@st.composite
def views(draw) -> LateView:
    phase = draw(st.none() | PHASES)
    served_at = draw(st.floats(1.0, 50.0)) if phase in SERVES else None
    return LateView(
        forward=Attempt(5, 0.0, phase, served_at=served_at),
        newest_generation=draw(st.sampled_from([5, 5, 5, 6])),
        last_good=draw(st.none() | st.just("old")),
        is_barred=draw(st.booleans()),
        timeout_s=TIMEOUT_S,
        verdicts=tuple(draw(VERDICTS)),
    )


TIMES = st.floats(0.0, 400.0)


@given(views(), TIMES)
def test_what_was_assigned_later_always_wins(view, now):
    """An abort, another rollout, a way back: nothing is put on top of it."""
    found = judge_late(view, now)
    if view.newest_generation != view.forward.generation:
        assert isinstance(found, EndLate) and found.state is LateState.OVERTAKEN
    else:
        assert not (isinstance(found, EndLate) and found.state is LateState.OVERTAKEN)


@given(views(), TIMES)
def test_only_a_gate_that_fails_sends_back_and_never_a_device_that_is_left_alone(view, now):
    found = judge_late(view, now)
    if isinstance(found, SendBack):
        assert any(
            v.outcome is Outcome.FAIL and v.gate.on_fail == "rollback" for v in view.verdicts
        )
        assert not view.is_barred
        assert view.forward.phase in SERVES
        assert found.release_id == view.last_good


@given(views(), TIMES)
def test_going_back_wins_over_every_other_end_of_a_device_that_serves(view, now):
    found = judge_late(view, now)
    fails = any(v.outcome is Outcome.FAIL and v.gate.on_fail == "rollback" for v in view.verdicts)
    is_free = not view.is_barred and view.newest_generation == view.forward.generation
    if fails and is_free and view.forward.phase in SERVES:
        assert isinstance(found, SendBack)


@given(views(), TIMES)
def test_a_pass_has_every_gate_passing_and_the_soak_ended(view, now):
    found = judge_late(view, now)
    if isinstance(found, EndLate) and found.state is LateState.PASSED:
        assert all(v.outcome is Outcome.PASS for v in view.verdicts)
        assert view.forward.phase is Phase.COMMITTED


@given(views())
def test_who_serves_is_judged_in_bounded_time(view):
    if view.forward.served_at is not None and not view.is_barred:
        assert judge_late(view, view.forward.served_at + TIMEOUT_S) is not None


@given(views(), TIMES)
def test_a_decision_repeats_itself_until_it_is_carried_out(view, now):
    assert judge_late(view, now) == judge_late(view, now)


def _end(reports: list[Phase], verdicts: tuple[Verdict, ...]) -> LateState | None:
    """As driver and store do: the furthest phase stays, the first end too."""
    phase, served_at, now, ended = None, None, 0.0, None
    for reported in [*reports, None, None]:
        now += 1.0
        if reported is None:
            now += TIMEOUT_S
        else:
            phase = furthest(phase, reported)
            served_at = now if served_at is None and phase in SERVES else served_at
        attempt = Attempt(5, 0.0, phase, served_at=served_at)
        found = judge_late(LateView(attempt, 5, "old", False, 10 * TIMEOUT_S, verdicts), now)
        if found is not None and ended is None:
            ended = LateState.SENT_BACK if isinstance(found, SendBack) else found.state
    return ended


@given(st.sampled_from([GOOD, BAD]), st.sampled_from([Outcome.PASS, Outcome.FAIL]), st.integers(0))
def test_reports_in_any_order_with_duplicates_end_the_same(script, outcome, seed):
    rng = random.Random(seed)
    if script is BAD:
        outcome = Outcome.PASS  # else what comes first, the device's own way back or the gate's
    verdicts = (Verdict(Gate("r", "x < 1"), 1, outcome, "", 1),)
    replayed = [*script, *rng.choices(script, k=rng.randint(0, 6))]
    rng.shuffle(replayed)
    assert _end(replayed, verdicts) is _end(list(script), verdicts)


STANDINGS = st.lists(
    st.tuples(st.sampled_from(LateState), st.none() | PHASES, st.integers(1, 5)), max_size=6
)


@given(STANDINGS, st.integers(0))
def test_counting_late_devices_needs_no_order_and_leaves_out_the_overtaken(standings, seed):
    shuffled = list(standings)
    random.Random(seed).shuffle(shuffled)
    group = group_of(shuffled)
    assert group == group_of(standings)
    assert 0 <= group.failed <= group.settled <= group.size
    assert group.size == sum(n for s, _, n in standings if s is not LateState.OVERTAKEN)


def test_every_final_phase_of_a_device_ends_its_judgement_or_waits_for_gates():
    for phase in FINAL - {Phase.COMMITTED, Phase.UNASSIGNED}:
        view = LateView(Attempt(5, 0.0, phase), 5, "old", False, TIMEOUT_S)
        assert judge_late(view, 0.0) == EndLate(
            LateState.UNDONE, f"the device ended it: {phase.value}"
        )
