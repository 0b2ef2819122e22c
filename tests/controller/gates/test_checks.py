"""The language of checks: what it means, and that no text does anything but mean something."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.errors import RequestInvalid
from remora_contract.gates import Gate
from remora_controller.gates.evaluate import DeviceEvidence, Samples, Scene, number, truth
from remora_controller.gates.judge import Outcome, WaveEvidence, judge
from remora_controller.gates.syntax import parse_check
from remora_controller.gates.tokens import MAX_TOKENS

NOTHING = {
    "failure_fraction": None,
    "failed_devices": 0.0,
    "unreachable_devices": 0.0,
    "unreachable_fraction": None,
}


def device(name: str, before: dict | None = None, **now: tuple[float, ...]) -> DeviceEvidence:
    def series(values: dict) -> dict:
        return {metric: (Samples(tuple(v)),) for metric, v in values.items()}

    return DeviceEvidence(name, series(now), series(before or {}))


def value(text: str, *devices: DeviceEvidence) -> float | None:
    condition = parse_check(f"{text} < 0")
    return number(condition.left, Scene(devices, NOTHING))


def holds(text: str, *devices: DeviceEvidence) -> bool | None:
    return truth(parse_check(text), Scene(devices, NOTHING))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x", 2.0),
        ("avg(x)", 2.0),
        ("min(x)", 1.0),
        ("max(x)", 3.0),
        ("last(x)", 3.0),
        ("count(x)", 3.0),
        ("p50(x)", 2.0),
        ("p95(x)", 3.0),
        ("increase(x)", 2.0),
        ("1 + 2 * 3", 7.0),
        ("(1 + 2) * 3", 9.0),
        ("-x + 5", 3.0),
        ("10 / 4 - 1", 1.5),
        ("1 / 0", None),
        ("absent", None),
        ("baseline(x)", 4.0),
        ("x / baseline(max(x))", 0.5),
        ('"x"', 2.0),
    ],
)
def test_numbers_mean_what_they_say(text, wanted):
    assert value(text, device("d", {"x": (4.0, 4.0)}, x=(1.0, 2.0, 3.0))) == wanted


def test_an_average_counts_devices_not_samples():
    assert value("x", device("a", x=(1.0,) * 9), device("b", x=(3.0,))) == 2.0


def test_a_metric_with_labels_stands_for_all_its_series():
    hot = DeviceEvidence("d", {"temperature_celsius": (Samples((40.0,)), Samples((70.0,)))})
    assert value("max(temperature_celsius)", hot) == 70.0


def test_a_counter_that_begins_again_loses_nothing():
    restarted = DeviceEvidence("d", {"x": (Samples((12.0, 3.0, 5.0), base=10.0, span_s=10.0),)})
    assert value("increase(x)", restarted) == 2.0 + 3.0 + 2.0
    assert value("rate(x)", restarted) == 0.7


def test_the_error_rate_is_failed_requests_by_requests():
    d = device("d", requests_total=(0.0, 100.0), requests_failed_total=(0.0, 3.0))
    assert value("error_rate", d) == 0.03
    idle = device("d", requests_total=(5.0, 5.0), requests_failed_total=(0.0, 0.0))
    assert holds("error_rate < 0.01", idle) is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("x > 1 and x < 3", True),
        ("x > 5 or x < 3", True),
        ("not x > 5", True),
        ("x > 5 and absent > 1", False),
        ("x < 5 or absent > 1", True),
        ("x < 5 and absent > 1", None),
        ("not absent > 1", None),
        ("x == 2 and x != 3 and x <= 2 and x >= 2", True),
    ],
)
def test_what_is_unknown_decides_nothing(text, wanted):
    assert holds(text, device("d", x=(2.0,))) is wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1 < 2 < 3",
        "x < ",
        "(x < 1",
        "x < 1)",
        "1 and 2",
        "avg(x < 1) < 2",
        "avg(avg(x)) < 1",
        "frobnicate(x) < 1",
        "baseline(baseline(x)) < 1",
        "baseline(failure_fraction) < 1",
        "baseline(x < 1)",
        "x < 1e999",
        "x = 1",
        "__import__('os') < 1",
        "x; y",
        "avg(error_rate) < 1",
        "(" * 40 + "x" + ")" * 40 + " < 1",
        "-" * 60 + "x < 1",
        "+".join(["1"] * (MAX_TOKENS // 2 + 2)) + " < 1",
        "x" * 600 + " < 1",
    ],
)
def test_what_cannot_be_read_is_refused_by_name(text):
    with pytest.raises(RequestInvalid, match="check"):
        parse_check(text)


@given(st.text('abx01. ()<>=+-*/"andornot', max_size=60))
def test_any_text_is_a_condition_or_refused(text):
    try:
        condition = parse_check(text)
    except RequestInvalid:
        return
    found = truth(condition, Scene([device("d", x=(1.0,), a=(2.0,))], NOTHING))
    assert found in (True, False, None)


def wave(*devices: DeviceEvidence, **counts: int) -> WaveEvidence:
    return WaveEvidence(1, counts.pop("expected", len(devices)), devices=devices, **counts)


def test_too_few_samples_are_inconclusive_whatever_they_say():
    gate = Gate("ttft", "p95(ttft_s) < 0.8", min_devices=2)
    good, few = device("a", ttft_s=(0.1,) * 3), device("b", ttft_s=(0.1,) * 2)
    verdict = judge(gate, wave(good, few))
    assert verdict.outcome is Outcome.INCONCLUSIVE
    assert verdict.detail == "1 of 2 devices have 3 samples of ttft_s"
    assert judge(gate, wave(good, device("b", ttft_s=(9.0,) * 3))).outcome is Outcome.FAIL


def test_a_wave_smaller_than_the_minimum_needs_all_of_itself():
    gate = Gate("ttft", "p95(ttft_s) < 0.8", min_devices=5)
    assert judge(gate, wave(device("a", ttft_s=(0.1,) * 3))).outcome is Outcome.PASS
    assert judge(gate, wave(expected=0)).outcome is Outcome.INCONCLUSIVE


def test_a_comparison_with_the_incumbent_needs_the_incumbent():
    gate = Gate("speed", "tokens_per_s > 0.9 * baseline(tokens_per_s)")
    now = {"tokens_per_s": (10.0,) * 3}
    assert judge(gate, wave(device("a", **now))).outcome is Outcome.INCONCLUSIVE
    slow = judge(gate, wave(device("a", {"tokens_per_s": (20.0,) * 3}, **now)))
    assert slow.outcome is Outcome.FAIL
    (left, have), (right, need) = slow.numbers
    assert (left, right) == ("avg(tokens_per_s)", "(0.9 * baseline(avg(tokens_per_s)))")
    assert (have, need) == (10.0, 18.0)
    fast = judge(gate, wave(device("a", {"tokens_per_s": (20.0,) * 3}, tokens_per_s=(19.0,) * 3)))
    assert fast.outcome is Outcome.PASS


def test_device_by_device_one_slow_device_does_not_hide_among_fast_ones():
    fast = [device(f"f{i}", x=(1.0,) * 3) for i in range(9)]
    slow = device("slow", x=(5.0,) * 3)
    assert judge(Gate("g", "x < 2"), wave(*fast, slow)).outcome is Outcome.PASS
    each = judge(Gate("g", "x < 2", scope="device"), wave(*fast, slow))
    assert each.outcome is Outcome.FAIL
    assert each.detail == "1 of 10 devices fail it: slow avg(x) = 5"
    lenient = Gate("g", "x < 2", scope="device", max_failing=0.2)
    assert judge(lenient, wave(*fast, slow)).outcome is Outcome.PASS


def test_the_rollout_counts_failures_and_who_went_silent():
    failing = Gate("f", "failure_fraction < 0.2", min_devices=4)
    assert judge(failing, wave(expected=9, settled=3, failed=3)).outcome is Outcome.INCONCLUSIVE
    assert judge(failing, wave(expected=9, settled=4, failed=1)).outcome is Outcome.FAIL
    silent = Gate("u", "unreachable_devices < 2")
    assert judge(silent, wave(expected=9, activated=5, unreachable=2)).outcome is Outcome.FAIL
    assert judge(silent, wave(expected=9, activated=5, unreachable=1)).outcome is Outcome.PASS


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.sampled_from((50, 90, 95, 99)))
def test_percentiles_are_nearest_ranks(values, q):
    found = value(f"p{q}(x)", device("d", x=tuple(values)))
    assert found == sorted(values)[max(0, math.ceil(q / 100 * len(values)) - 1)]
