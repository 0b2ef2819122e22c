"""Counts of arms only grow, whatever devices tell, and are kept apart from other metrics."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from remora_contract.experiments import ARM_COUNTS, SHADOW_COUNTS
from remora_controller.domain import MetricPoint
from remora_controller.experiments.tally import MAX_KEPT, Counted, ExperimentTally, Sum, followed
from remora_controller.presence import MAX_METRICS_PER_DEVICE, Presence

LABEL = "sql/candidate/0123456789ab"


def point(
    value: float, at: float = 1.0, name: str = "requests", label: str = LABEL, device: str = "d"
) -> MetricPoint:
    return MetricPoint(device, f"experiment_{name}_total.{label}", value, at)


def total(tally: ExperimentTally, name: str = "requests", *devices: str) -> float:
    return tally.sums([LABEL], devices or ("d",))[LABEL].counts.get(f"experiment_{name}", 0.0)


@given(st.lists(st.integers(0, 1000), min_size=1))
def test_a_total_never_falls_and_grows_by_what_was_told_at_most(told: list[int]) -> None:
    known: Counted | None = None
    before = 0.0
    for value in map(float, told):
        now = followed(known, value)
        last = 0.0 if known is None else known.told
        assert now.total - before == max(0.0, value - last)
        known, before = now, now.total


# What an agent does: it answers, writes its totals down now and then, tells them, or dies and goes
# on from what it had written.
_STEPS = st.lists(st.sampled_from(("answer", "fail", "flush", "tell", "die")), max_size=60)


@given(_STEPS)
def test_a_device_that_dies_is_counted_twice_for_nothing(steps: list[str]) -> None:
    tally = ExperimentTally()
    true, held, written = Counter[str](), Counter[str](), Counter[str]()
    for at, step in enumerate(steps):
        if step in ("answer", "fail"):
            for counts in (true, held):
                counts.update(requests=1, failures=int(step == "fail"))
        elif step == "flush":
            written = held.copy()
        elif step == "die":
            held = written.copy()
        else:
            tally.take([point(held[n], float(at), n) for n in ("requests", "failures")])
            requests, failures = total(tally), total(tally, "failures")
            assert 0 <= failures <= requests <= true["requests"]
            assert failures <= true["failures"]
            if "die" not in steps[:at]:
                assert (requests, failures) == (true["requests"], true["failures"])


def test_what_is_told_late_and_what_makes_no_sense_changes_nothing() -> None:
    tally = ExperimentTally()
    tally.take([point(10, at=5.0)])
    tally.take([point(3, at=4.0), point(-1, at=6.0), point(1e300, at=6.0)])
    assert total(tally) == 10
    others = [point(1, label="no/label"), point(1, name="inventions"), point(1, label="a/b/XYZ")]
    others += [MetricPoint("d", "requests_total", 1.0, 1.0)]
    assert tally.take(others) == others


def test_other_bytes_are_another_count_and_devices_add_up() -> None:
    tally = ExperimentTally()
    newer = LABEL.replace("0", "f")
    tally.take([point(3, device="a"), point(4, device="b"), point(50, label=newer, device="b")])
    found = tally.sums([LABEL, newer], ["a", "b", "nobody"])
    assert found[LABEL] == Sum(2, {"experiment_requests": 7.0})
    assert found[newer] == Sum(1, {"experiment_requests": 50.0})
    assert tally.sums([LABEL], ["a"])[LABEL].counts == {"experiment_requests": 3.0}


def test_what_the_store_has_goes_on_after_a_restart() -> None:
    first = ExperimentTally()
    first.take([point(10, at=1.0), point(4, at=2.0)])
    rows, dropped = first.take_unsaved()
    assert (len(rows), dropped) == (1, [])
    assert first.take_unsaved() == ([], []), "what did not change is not written again"
    first.take([point(4, at=3.0)])
    assert first.take_unsaved()[0] == []
    second = ExperimentTally()
    second.load(rows)
    assert total(second) == 10
    second.take([point(6, at=4.0)])
    assert total(second) == 12


def test_labels_of_a_device_are_bounded_and_the_longest_untold_go() -> None:
    tally = ExperimentTally()
    labels = [f"e{i}/arm/{i:012x}" for i in range(MAX_KEPT + 3)]
    tally.take([point(1, label=label) for label in labels])
    rows, dropped = tally.take_unsaved()
    assert [label for _, label in dropped] == labels[:3]
    assert {r.label for r in rows} == set(labels[3:])
    tally.forget("d")
    assert tally.sums(labels, ["d"])[labels[-1]] == Sum(0, {})


def test_arms_take_no_place_from_a_devices_other_metrics() -> None:
    presence = Presence(0.0, 30.0)
    names = [f"experiment_{n}_total" for n in ARM_COUNTS]
    names += [f"shadow_{n}_total" for n in SHADOW_COUNTS]
    for i in range(MAX_METRICS_PER_DEVICE // len(names) + 1):
        label = f"sql/candidate/{i:012x}"
        presence.add_metrics("d", [MetricPoint("d", f"{n}.{label}", 1.0, 1.0) for n in names])
    presence.add_metrics("d", [MetricPoint("d", "ttft_s", 0.1, 1.0)])
    assert set(presence.metrics("d")) == {"ttft_s"}
    assert [p.name for p in presence.take_unsaved()[1]] == ["ttft_s"]


def test_gates_may_look_at_what_arms_count() -> None:
    presence = Presence(0.0, 30.0)
    presence.samples.want(frozenset({"experiment_requests_total"}))
    presence.add_metrics("d", [point(1, at=1.0), point(5, at=2.0)])
    (samples,) = presence.samples.samples("d", "experiment_requests_total", 0.0, 10.0)
    assert samples.values == (1.0, 5.0)
