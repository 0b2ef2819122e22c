"""Maintenance windows: what people write, and when it is open."""

from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_contract.windows import is_open, next_opening, parse_window, parse_windows, windows_of

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str, zone=timezone.utc) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


def opened(window: str, when: str, zone=timezone.utc) -> bool:
    return is_open([parse_window(window)], at(when, zone), zone)


@pytest.mark.parametrize(
    ("window", "when", "wanted"),
    [
        ("02:00-05:00", "2026-05-06T02:00", True),
        ("02:00-05:00", "2026-05-06T04:59", True),
        ("02:00-05:00", "2026-05-06T05:00", False),
        ("22:00-04:00", "2026-05-06T23:00", True),
        ("22:00-04:00", "2026-05-06T03:59", True),
        ("22:00-04:00", "2026-05-06T12:00", False),
        ("fri@22:00-04:00", "2026-05-09T03:00", True),  # Saturday morning is Friday's window
        ("fri@22:00-04:00", "2026-05-08T03:00", False),
        ("sat+sun@00:00-24:00", "2026-05-09T00:00", True),
        ("sat+sun@00:00-24:00", "2026-05-11T00:00", False),
        ("sat-mon@00:00-24:00", "2026-05-11T12:00", True),
        ("02:00-05:00@Europe/Berlin", "2026-05-06T00:30", True),
        ("mon-fri 02:00-05:00 Europe/Berlin", "2026-05-06T03:30", False),
    ],
)
def test_a_window_is_open_when_it_says(window, when, wanted):
    assert opened(window, when) is wanted


def test_what_begins_in_the_hour_that_the_clocks_skip_begins_an_hour_later():
    # 2026-03-29 in Berlin: 02:00 becomes 03:00, which is 01:00 UTC.
    window = [parse_window("02:30-04:00@Europe/Berlin")]
    assert not is_open(window, at("2026-03-29T01:29"), timezone.utc)
    assert is_open(window, at("2026-03-29T01:30"), timezone.utc)
    assert not is_open(window, at("2026-03-29T02:00"), timezone.utc)


@given(
    st.integers(0, 6),
    st.integers(0, 1439),
    st.integers(1, 1440),
    st.floats(1.6e9, 1.9e9),
    st.sampled_from([timezone.utc, BERLIN, timezone(timedelta(hours=-9))]),
)
def test_every_window_opens_within_eight_days_and_then_is_open(day, begin, end, now, zone):
    if begin == end:
        return
    name = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")[day]
    window = [parse_window(f"{name}@{_clock(begin)}-{_clock(end)}")]
    opens = next_opening(window, now, zone)
    assert now <= opens <= now + 8.1 * 86_400
    skipped = zone is BERLIN and not is_open(window, opens, zone)
    assert is_open(window, opens, zone) or skipped
    assert (opens == now) == is_open(window, now, zone)


def _clock(minutes: int) -> str:
    return f"{minutes // 60:02}:{minutes % 60:02}"


@pytest.mark.parametrize(
    "text",
    ["", "2-5", "25:00-26:00", "02:00-02:00", "xyz@02:00-05:00", "02:00-05:00@Mars/Olympus",
     "24:00-05:00", "02:60-05:00", "02:00-05:00@../../etc/passwd", "x" * 200],
)  # fmt: skip
def test_what_is_no_window_is_refused(text):
    with pytest.raises(ValueError, match=r"window|time zone"):
        parse_window(text)


def test_labels_hold_windows_and_there_are_not_too_many():
    labels = {"maintenance-window-2": "b", "maintenance-window": "a", "maintenance-windows": "no"}
    assert windows_of(labels) == ("a", "b")
    with pytest.raises(ValueError, match="at most"):
        parse_windows(["02:00-05:00"] * 17)
