"""Late joiners."""

from remora_controller.domain import Assignment, Device, RolloutRecord, RolloutSpec, RolloutState
from remora_controller.late import Completed, missed_rollout
from remora_controller.selector import parse_selector

DEVICE = Device("d1", 0.0, "key", device_labels={"site": "berlin"})


def completed(name: str, at: float, selector: str = "") -> Completed:
    record = RolloutRecord(
        name,
        f"rel-{name}",
        selector,
        RolloutSpec(),
        1,
        at - 1,
        "op",
        RolloutState.COMPLETED,
        finished_at=at,
    )
    return Completed(record, parse_selector(selector))


def assignment(rollout: str | None, at: float) -> Assignment:
    return Assignment("d1", 1, "rel", rollout, 0.0, False, at)


def missed(newest, *rollouts):
    found = missed_rollout(DEVICE, newest, rollouts)
    return found.rollout_id if found else None


def test_a_new_device_goes_straight_to_the_newest_completed_release():
    assert missed(None, completed("new", 20.0), completed("old", 10.0)) == "new"


def test_a_device_that_was_away_gets_what_it_missed():
    assert missed(assignment("old", 5.0), completed("new", 20.0), completed("old", 10.0)) == "new"


def test_only_rollouts_for_its_labels_count():
    paris = completed("paris", 20.0, "site=paris")
    assert missed(None, paris, completed("all", 10.0)) == "all"
    assert missed(None, paris) is None


def test_a_device_is_not_given_the_same_rollout_twice():
    assert missed(assignment("new", 5.0), completed("new", 20.0)) is None


def test_what_was_assigned_later_stands():
    """For example a way back after a failed rollout."""
    assert missed(assignment("failed", 30.0), completed("new", 20.0)) is None


def test_an_older_rollout_is_never_a_substitute_for_the_newest():
    newest = assignment("new", 15.0)
    assert missed(newest, completed("new", 20.0), completed("old", 18.0)) is None
