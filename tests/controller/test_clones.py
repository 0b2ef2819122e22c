"""One identity on two machines."""

from hypothesis import given
from hypothesis import strategies as st

from remora_controller.clones import REMEMBERED_BOOTS, CloneFound, Follows, follow
from remora_controller.domain import BootTrail


def walk(calls):
    trail = BootTrail()
    for boot, seq in calls:
        found = follow(trail, boot, seq)
        if isinstance(found, CloneFound):
            return found
        trail = found.trail
    return trail


def test_a_restarted_agent_is_no_clone():
    assert isinstance(walk([("a", 1), ("a", 2), ("b", 1), ("b", 2), ("c", 1)]), BootTrail)


def test_a_boot_that_returns_after_another_is_a_clone():
    found = walk([("a", 1), ("b", 1), ("a", 2)])
    assert isinstance(found, CloneFound)
    assert "boot a spoke again" in found.reason


def test_a_count_that_goes_backwards_is_a_clone():
    assert isinstance(walk([("a", 1), ("a", 5), ("a", 4)]), CloneFound)


def test_the_same_call_sent_again_is_no_clone():
    assert walk([("a", 1), ("a", 1), ("a", 2)]) == BootTrail("a", 2)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=40))
def test_one_machine_is_never_taken_for_two_and_the_trail_is_bounded(calls_per_boot):
    trail = BootTrail()
    for boot, calls in enumerate(calls_per_boot):
        for seq in range(1, calls + 1):
            found = follow(trail, f"boot-{boot}", seq)
            assert isinstance(found, Follows)
            trail = found.trail
    assert len(trail.earlier) <= REMEMBERED_BOOTS


@given(st.lists(st.sampled_from("AB"), min_size=1, max_size=30))
def test_two_machines_are_found_as_soon_as_the_first_speaks_again(order):
    trail, counts = BootTrail(), {"A": 0, "B": 0}
    for at, who in enumerate(order):
        counts[who] += 1
        found = follow(trail, who, counts[who])
        spoke_and_lost_its_turn = who in order[:at] and order[at - 1] != who
        assert isinstance(found, CloneFound) == spoke_and_lost_its_turn
        if isinstance(found, CloneFound):
            return
        trail = found.trail
