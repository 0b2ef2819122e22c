"""The device state machine: the whole table, crashes at every boundary, and what it decides."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.control.activation import (
    MAX_ABNORMAL_EXITS,
    Advance,
    Desired,
    Effect,
    Idle,
    Perform,
    Record,
    WaitUntil,
    advance,
    after_start,
    assign,
    decide,
)
from remora_agent.control.phase import NEXT, RESUMABLE, UNTOUCHABLE, Event
from remora_contract.device_phase import FINAL, Phase
from remora_contract.errors import Conflict, InternalFault


def desired(generation: int = 1, release_id: str = "b-1", soak_s: float = 10.0) -> Desired:
    return Desired(generation, release_id, "{}", "rollout", soak_s, False)


def record(phase: Phase, committed: str | None = "a-1", previous: str | None = None) -> Record:
    return Record(desired(), phase, 100.0, committed, previous)


def run_to_end(
    start: Record, outcomes: dict[Effect, Event], unhealthy: str | None = None
) -> Record:
    """Follows `decide` with the given outcome of each effect (DONE when absent)."""
    now, current = start.entered_at_s, start
    for _ in range(50):
        action = decide(current, now, unhealthy if current.phase is Phase.SOAKING else None)
        if isinstance(action, Idle):
            return current
        if isinstance(action, WaitUntil):
            now = action.at_s
        elif isinstance(action, Advance):
            current = advance(current, action.event, now)
        else:
            default = Event.ADMITTED if action.effect is Effect.ADMIT else Event.DONE
            current = advance(current, outcomes.get(action.effect, default), now, "Code", "why")
    raise AssertionError(f"no end from {start.phase}")


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(Phase, Event)))
def test_every_pair_is_either_in_the_table_or_impossible(phase, event):
    if (phase, event) in NEXT:
        assert advance(record(phase), event, 1.0).phase is NEXT[phase, event]
    else:
        with pytest.raises(InternalFault, match=f"{event.value}.*{phase.value}"):
            advance(record(phase), event, 1.0)


def test_final_phases_decide_nothing_and_all_others_decide_something():
    for phase in Phase:
        assert isinstance(decide(record(phase), 100.0), Idle) == (phase in FINAL)


def test_every_phase_that_is_not_final_can_be_interrupted():
    assert {p for p, e in NEXT if e is Event.INTERRUPTED} == set(Phase) - FINAL


@pytest.mark.parametrize("phase", sorted(RESUMABLE, key=lambda p: p.value))
def test_interrupted_before_the_switch_resumes_where_it_was(phase):
    assert advance(record(phase), Event.INTERRUPTED, 5.0).phase is phase
    assert run_to_end(advance(record(phase), Event.INTERRUPTED, 5.0), {}).phase is Phase.COMMITTED


@pytest.mark.parametrize("phase", [Phase.SWITCHING, Phase.SOAKING, Phase.REVERTING])
def test_interrupted_in_or_after_the_switch_goes_back(phase):
    restarted = advance(record(phase), Event.INTERRUPTED, 5.0, "Interrupted", "killed")
    ended = run_to_end(restarted, {})
    assert (ended.phase, ended.committed, ended.error_code) == (
        Phase.REVERTED,
        "a-1",
        "Interrupted",
    )


def test_a_healthy_run_commits_and_remembers_what_it_replaced():
    ended = run_to_end(record(Phase.ASSIGNED), {})
    assert (ended.phase, ended.committed, ended.previous) == (Phase.COMMITTED, "b-1", "a-1")


def test_soaking_waits_for_the_whole_soak_time():
    soaking = record(Phase.SOAKING)
    assert decide(soaking, 109.9) == WaitUntil(110.0)
    assert decide(soaking, 110.0) == Advance(Event.SOAKED)
    assert decide(soaking, 110.0, "engine died") == Advance(Event.UNHEALTHY)


@pytest.mark.parametrize("effect", [Effect.STAGE, Effect.BUILD, Effect.PROVE])
def test_a_failure_before_the_switch_fails_and_keeps_what_is_committed(effect):
    ended = run_to_end(record(Phase.ASSIGNED), {effect: Event.FAILED})
    assert (ended.phase, ended.committed, ended.error_code) == (Phase.FAILED, "a-1", "Code")


def test_a_failed_switch_reverts_and_a_failed_revert_fails_with_the_first_cause():
    switched = replace(record(Phase.SWITCHING))
    failed = advance(switched, Event.FAILED, 1.0, "EngineFault", "no memory")
    assert failed.phase is Phase.REVERTING
    ended = advance(failed, Event.FAILED, 2.0, "NotFound", "nothing to go back to")
    assert (ended.phase, ended.error_code) == (Phase.FAILED, "EngineFault")


def test_three_abnormal_exits_of_a_committed_release_go_back_to_the_previous_one():
    committed = record(Phase.COMMITTED, committed="b-1", previous="a-1")
    assert after_start(committed, MAX_ABNORMAL_EXITS - 1) is None
    event = after_start(committed, MAX_ABNORMAL_EXITS)
    assert event is Event.CRASH_LOOP
    ended = run_to_end(advance(committed, event, 1.0), {})
    assert (ended.phase, ended.committed, ended.previous) == (Phase.REVERTED, "a-1", None)


@pytest.mark.parametrize("phase", sorted(FINAL, key=lambda p: p.value))
def test_a_crash_loop_without_an_earlier_release_ends_with_nothing_that_serves(phase):
    current = replace(record(phase, "b-1", None), error_code="Earlier")
    event = after_start(current, MAX_ABNORMAL_EXITS)
    reverting = advance(current, event, 1.0, "AbnormalExits", "three times")
    assert reverting.committed is None
    ended = advance(reverting, Event.FAILED, 2.0, "NotFound", "nothing to go back to")
    assert (ended.phase, ended.error_code) == (Phase.FAILED, "AbnormalExits")
    assert after_start(ended, 10) is None, "there is nothing left to give up"


def test_a_way_back_that_crashes_again_and_again_is_given_up_too():
    reverting = record(Phase.REVERTING, "a-1", None)
    assert after_start(reverting, MAX_ABNORMAL_EXITS - 1) is Event.INTERRUPTED
    event = after_start(reverting, MAX_ABNORMAL_EXITS)
    assert event is Event.CRASH_LOOP
    assert advance(reverting, event, 1.0).committed is None


@pytest.mark.parametrize("phase", sorted(RESUMABLE, key=lambda p: p.value))
def test_while_a_newer_release_is_worked_on_none_is_given_up(phase):
    assert after_start(record(phase), 10) is Event.INTERRUPTED


@pytest.mark.parametrize("phase", list(Phase))
def test_a_newer_assignment_replaces_unless_a_switch_is_under_way(phase):
    current = record(phase)
    if phase in UNTOUCHABLE:
        with pytest.raises(Conflict, match=phase.value):
            assign(current, desired(2, "c-1"), 1.0)
    else:
        fresh = assign(current, desired(2, "c-1"), 1.0)
        assert (fresh.phase, fresh.committed) == (Phase.ASSIGNED, "a-1")


@pytest.mark.parametrize("phase", list(Phase))
def test_assigning_nothing_drops_what_is_unfinished_and_keeps_what_is_committed(phase):
    nothing = replace(desired(2), release_id=None)
    if phase in UNTOUCHABLE | {Phase.SOAKING}:
        with pytest.raises(Conflict, match=phase.value):
            assign(record(phase), nothing, 1.0)
    else:
        dropped = assign(record(phase), nothing, 1.0)
        assert (dropped.phase, dropped.committed) == (Phase.UNASSIGNED, "a-1")
        assert decide(dropped, 2.0) == Idle()
        assert after_start(dropped, 0) is None


def test_a_device_that_lost_its_memory_can_be_assigned_nothing():
    assert assign(None, replace(desired(9), release_id=None), 1.0).phase is Phase.UNASSIGNED


def test_an_assignment_of_an_old_generation_is_not_taken():
    with pytest.raises(Conflict, match="not newer"):
        assign(record(Phase.COMMITTED), desired(1), 1.0)


def test_assigning_what_already_serves_keeps_the_way_back():
    current = record(Phase.ASSIGNED, committed="b-1", previous="a-1")
    ended = advance(current, Event.ALREADY_SERVING, 1.0)
    assert (ended.phase, ended.committed, ended.previous) == (Phase.COMMITTED, "b-1", "a-1")


@given(
    st.lists(st.sampled_from(list(Event)), max_size=30),
    st.sampled_from(list(Phase)),
)
def test_whatever_happens_committed_names_a_release_that_was_once_whole(events, start):
    """Only a soaked release or the earlier ones are ever what a restart serves."""
    current = record(start, committed="a-1", previous="z-1")
    for event in events:
        if (current.phase, event) not in NEXT:
            continue
        before = current
        current = advance(current, event, 1.0)
        if current.committed != before.committed:
            assert event in (Event.SOAKED, Event.CRASH_LOOP, Event.ALREADY_SERVING)


@given(st.sampled_from(sorted(Effect, key=lambda e: e.value)), st.booleans())
def test_every_run_ends_in_a_final_phase(failing, unhealthy):
    outcome = Event.REFUSED if failing is Effect.ADMIT else Event.FAILED
    ended = run_to_end(record(Phase.ASSIGNED), {failing: outcome}, "bad" if unhealthy else None)
    assert ended.phase in FINAL


def test_perform_is_what_effect_phases_decide():
    assert decide(record(Phase.STAGING), 0.0) == Perform(Effect.STAGE)
    assert decide(record(Phase.REVERTING), 0.0) == Perform(Effect.REVERT)
    assert decide(None, 0.0) == Idle()
