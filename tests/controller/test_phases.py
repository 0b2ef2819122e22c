"""The order in which a device's reports accumulate."""

from __future__ import annotations

from remora_agent.control.phase import NEXT
from remora_contract.device_phase import FINAL, Phase
from remora_controller.phases import ORDER, furthest, parse_phase


def test_the_order_holds_every_phase_of_the_contract_once():
    assert sorted(ORDER, key=str) == sorted(Phase, key=str)


def test_whatever_a_device_does_next_counts_as_further():
    """The agent's table against the controller's lattice: no step is ever hidden by an earlier."""
    for (before, _), after in NEXT.items():
        assert furthest(before, after) is after


def test_only_a_crash_loop_leaves_a_final_phase():
    left = {(p, e.value) for (p, e) in NEXT if p in FINAL}
    assert left == {(Phase.COMMITTED, "crash_loop")}


def test_the_word_of_a_newer_agent_is_no_phase():
    assert parse_phase("HIBERNATING") is None
    assert parse_phase("COMMITTED") is Phase.COMMITTED
