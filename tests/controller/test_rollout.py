"""Rollout decisions, one behaviour at a time."""

from dataclasses import replace

import pytest

from remora_contract.device_phase import Phase
from remora_contract.errors import Refused
from remora_controller.domain import RolloutSpec, RolloutState
from remora_controller.rollout import AdvanceWave, Assign, Attempt, SetState
from remora_controller.transitions import NEXT, Request, requested
from tests.controller.rollout_world import NEW, OLD, World, WorldDevice

SPEC = RolloutSpec(soak_s=0, wave_timeout_s=100)


def world(*waves: int, spec: RolloutSpec = SPEC, **device: object) -> World:
    return World([WorldDevice(f"d{i}", w, **device) for i, w in enumerate(waves)], spec)


def finish(w: World, device_id: str, phase: Phase) -> None:
    forward = w.devices[device_id].forward
    assert forward is not None
    w.report(device_id, forward.generation, phase)


def test_only_the_first_wave_is_touched_until_it_succeeds():
    w = world(1, 2, 2)
    assert w.decide() == [Assign("d0", NEW, False)]
    w.settle_decisions()
    finish(w, "d0", Phase.SOAKING)
    assert w.decide() == []
    finish(w, "d0", Phase.COMMITTED)
    assert w.decide() == [AdvanceWave(2)]


def test_it_completes_when_all_waves_succeeded():
    w = world(1, 2, 2, 3)
    w.run()
    assert w.state is RolloutState.COMPLETED
    assert w.reason == "4 succeeded"


@pytest.mark.parametrize("phase", [Phase.REFUSED, Phase.FAILED, Phase.REVERTED])
def test_a_failed_first_wave_stops_and_sends_it_back(phase):
    w = world(1, 2)
    w.settle_decisions()
    finish(w, "d0", phase)
    (stop,) = w.decide()
    assert stop == SetState(
        RolloutState.ROLLING_BACK, "1 of 1 devices of wave 1 failed; 100% had to succeed"
    )
    w.apply(stop)
    assert w.decide() == [Assign("d0", OLD, True)]


def test_a_device_of_an_earlier_wave_that_reverts_later_still_stops_it():
    w = world(1, 2)
    w.settle_decisions()
    finish(w, "d0", Phase.COMMITTED)
    w.settle_decisions()
    finish(w, "d0", Phase.REVERTED)
    (stop,) = w.decide()
    assert isinstance(stop, SetState)
    assert stop.state is RolloutState.ROLLING_BACK


def test_failures_within_the_threshold_are_tolerated():
    w = world(1, 1, 1, 1, spec=replace(SPEC, success_threshold=0.75))
    w.devices["d2"].is_good = False
    w.run()
    assert w.state is RolloutState.COMPLETED


def test_it_stops_as_soon_as_the_threshold_is_out_of_reach_not_at_the_end():
    w = world(1, 1, 1, 1, spec=replace(SPEC, success_threshold=0.75))
    w.settle_decisions()
    finish(w, "d0", Phase.FAILED)
    assert w.decide() == []
    finish(w, "d1", Phase.FAILED)
    (stop,) = w.decide()
    assert isinstance(stop, SetState)


def test_every_touched_device_goes_back_and_no_other():
    w = world(1, 2, 2, 3)
    w.devices["d1"].is_good = False
    w.run()
    assert w.state is RolloutState.ROLLED_BACK
    back = {a.device_id: a.release_id for a in w.touched if a.is_rollback}
    assert back == {"d0": OLD, "d1": OLD, "d2": OLD}
    assert w.reason == (
        "1 of 2 devices of wave 2 failed; 100% had to succeed; "
        "3 of 3 devices confirmed their last good release"
    )


def test_a_device_without_a_last_good_release_is_told_to_keep_what_it_runs():
    w = world(1, has_old=False, is_good=False)
    w.run()
    assert w.touched[-1] == Assign("d0", None, True)
    assert w.state is RolloutState.ROLLED_BACK
    assert "1 had no earlier release to return to" in w.reason


def test_offline_devices_do_not_block_a_wave_and_are_counted_apart():
    w = world(1, 2, 2)
    w.devices["d2"].is_online = False
    w.run()
    assert w.state is RolloutState.COMPLETED
    assert w.reason == "2 succeeded; 1 offline get it when they return"
    assert w.devices["d2"].forward is None


def test_devices_that_were_removed_are_not_promised_the_release():
    w = world(1, 2, 2)
    w.devices["d2"].is_eligible = False
    w.run()
    assert w.reason == "2 succeeded; 1 removed, quarantined or relabelled"


def test_a_first_wave_that_was_removed_pauses_at_once_and_proves_nothing():
    w = world(1, 2)
    w.settle_decisions()
    w.devices["d0"].is_eligible = False
    (pause,) = w.decide()
    assert isinstance(pause, SetState)
    assert pause.state is RolloutState.PAUSED
    assert "abort, and start again" in pause.reason


def test_a_first_wave_that_nobody_answers_is_inconclusive_not_passed():
    w = world(1, 2)
    w.devices["d0"].is_online = False
    w.settle_decisions()
    assert w.state is RolloutState.RUNNING
    w.run()
    assert w.state is RolloutState.PAUSED
    assert w.reason.startswith("inconclusive")
    assert w.touched == []


def test_a_device_that_vanishes_while_changing_holds_the_wave_until_the_timeout():
    w = world(1, 1, 2)
    w.settle_decisions()
    finish(w, "d0", Phase.SWITCHING)
    finish(w, "d1", Phase.COMMITTED)
    w.devices["d0"].is_online = False
    w.now = SPEC.wave_timeout_s - 1
    assert w.decide() == []
    w.now = SPEC.wave_timeout_s
    (stop,) = w.decide()
    assert isinstance(stop, SetState)
    assert stop.state is RolloutState.ROLLING_BACK


def test_a_device_that_is_online_and_never_finishes_fails_at_the_timeout():
    w = world(1, 2)
    w.settle_decisions()
    w.now = SPEC.wave_timeout_s
    (stop,) = w.decide()
    assert isinstance(stop, SetState)


def test_right_after_a_restart_silence_proves_nothing():
    """Neither online nor surely gone: the wave waits instead of passing without the device."""
    w = world(1, 1)
    w.settle_decisions()
    finish(w, "d0", Phase.COMMITTED)
    view = w.view()
    unsure = tuple(replace(m, is_online=False, is_gone=False) for m in view.members)
    from remora_controller.rollout import decide

    assert decide(replace(view, members=unsure), w.now) == []


def test_a_quarantined_device_is_set_apart():
    w = world(1, 1)
    w.settle_decisions()
    finish(w, "d0", Phase.COMMITTED)
    w.devices["d1"].is_eligible = False
    w.settle_decisions()
    assert w.state is RolloutState.COMPLETED


def test_max_unavailable_holds_devices_of_a_wave_back():
    w = world(1, 1, 1, spec=replace(SPEC, max_unavailable=2))
    assert len(w.decide()) == 2
    w.settle_decisions()
    finish(w, "d0", Phase.COMMITTED)
    assert w.decide() == [Assign("d2", NEW, False)]


def test_a_paused_rollout_touches_nobody_and_goes_on_when_resumed():
    w = world(1, 2)
    w.state = RolloutState.PAUSED
    assert w.decide() == []
    w.state = RolloutState.RUNNING
    w.run()
    assert w.state is RolloutState.COMPLETED


def test_an_abort_sends_touched_devices_back():
    w = world(1, 2)
    w.settle_decisions()
    w.state = RolloutState.ABORTING
    assert w.decide() == [Assign("d0", OLD, True)]
    w.run()
    assert w.state is RolloutState.ABORTED


def test_an_abort_that_keeps_lets_changing_devices_finish_and_touches_nobody():
    w = world(1, 2)
    w.settle_decisions()
    w.state, w.keep = RolloutState.ABORTING, True
    assert w.decide() == []
    finish(w, "d0", Phase.COMMITTED)
    w.run()
    assert w.state is RolloutState.ABORTED
    assert len(w.touched) == 1


def test_going_back_waits_for_the_online_and_not_for_the_gone():
    w = world(1, 1)
    w.settle_decisions()
    w.devices["d1"].is_online = False
    w.state = RolloutState.ROLLING_BACK
    w.settle_decisions()
    assert w.state is RolloutState.ROLLING_BACK
    assert {a.device_id for a in w.touched if a.is_rollback} == {"d0", "d1"}
    w.run()
    assert w.state is RolloutState.ROLLED_BACK
    assert "1 have not confirmed it" in w.reason


def test_a_late_success_after_the_timeout_counts_as_success():
    w = world(1, 1, spec=replace(SPEC, success_threshold=0.5))
    w.settle_decisions()
    finish(w, "d0", Phase.COMMITTED)
    w.now = SPEC.wave_timeout_s
    finish(w, "d1", Phase.COMMITTED)
    w.settle_decisions()
    assert w.reason == "2 succeeded"


@pytest.mark.parametrize("state", [s for s in RolloutState if s.is_final])
def test_nothing_is_decided_once_it_is_over(state):
    w = world(1)
    w.state = state
    assert w.decide() == []


@pytest.mark.parametrize("state", RolloutState)
@pytest.mark.parametrize("request_", Request)
def test_requests_follow_the_table_or_are_refused(state, request_):
    if (state, request_) in NEXT:
        assert requested(state, request_, "r-1") is NEXT[state, request_]
    else:
        with pytest.raises(Refused, match=f"r-1 is {state.value}"):
            requested(state, request_, "r-1")


@pytest.mark.parametrize("state", [s for s in RolloutState if not s.is_final])
def test_abort_is_always_possible_before_the_end(state):
    assert requested(state, Request.ABORT, "r-1") is RolloutState.ABORTING


def test_an_attempt_without_a_release_is_over_when_the_device_has_dropped_the_old_one():
    told = Attempt(1, 0.0, Phase.ASSIGNED, is_nothing=True)
    assert not told.is_settled
    assert replace(told, phase=Phase.UNASSIGNED).is_settled


def test_an_abort_ends_when_a_device_without_a_way_back_has_confirmed_or_is_away():
    w = world(1, has_old=False)
    w.settle_decisions()
    w.state = RolloutState.ABORTING
    w.settle_decisions()
    assert w.state is RolloutState.ABORTING, "the device may still be changing"
    w.step_device("d0")
    w.settle_decisions()
    assert w.state is RolloutState.ABORTED
