"""docs/states.md says what the code does."""

from __future__ import annotations

from remora_controller.domain import RolloutState
from remora_controller.transitions import BY_ITSELF
from scripts.state_reference import PAGE, page


def test_the_page_has_not_drifted():
    assert PAGE.read_text() == page(), "run python -m scripts.state_reference"


def test_every_state_that_has_begun_to_stop_or_end_leads_to_an_end():
    for state in RolloutState:
        seen, reached = set(), {state}
        while reached - seen:
            seen |= reached
            reached = {to for at in reached for to in BY_ITSELF.get(at, {})}
        waits = {RolloutState.PAUSED, RolloutState.AWAITING_APPROVAL}
        assert any(s.is_final for s in seen) or state in waits
