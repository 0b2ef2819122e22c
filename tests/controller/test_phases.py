"""The order in which a device's reports accumulate."""

from __future__ import annotations

from remora_agent.control.phase import NEXT, Event
from remora_contract.device_phase import FINAL, Phase
from remora_controller.phases import ORDER, furthest, parse_phase

ENDED = FINAL - {Phase.COMMITTED}


def test_the_order_holds_every_phase_of_the_contract_once():
    assert sorted(ORDER, key=str) == sorted(Phase, key=str)


def test_whatever_a_device_does_next_counts_as_further():
    """The agent's table against the controller's lattice: no step is ever hidden by an earlier."""
    for (before, event), after in NEXT.items():
        if before not in ENDED or event is not Event.CRASH_LOOP:
            assert furthest(before, after) is after


def test_how_a_generation_ended_is_not_hidden_by_a_crash_loop_of_what_served_before_it():
    for before in ENDED:
        assert furthest(before, NEXT[before, Event.CRASH_LOOP]) is before


def test_only_a_crash_loop_leaves_a_final_phase():
    assert {(p, e) for (p, e) in NEXT if p in FINAL} == {(p, Event.CRASH_LOOP) for p in FINAL}


def test_the_word_of_a_newer_agent_is_no_phase():
    assert parse_phase("HIBERNATING") is None
    assert parse_phase("COMMITTED") is Phase.COMMITTED
