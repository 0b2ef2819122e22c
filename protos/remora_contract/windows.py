"""Maintenance windows: when a device may switch. Written so that a device label can hold one.

    02:00-05:00                          every day, in the device's time zone
    mon-fri@22:00-04:00                  Monday evening to Saturday morning: over midnight
    sat+sun@00:00-24:00@Europe/Berlin    all of both days there

A window belongs to the day on which it begins. The wall clock counts: where it is put forward, what
begins or ends in the hour that is skipped does so an hour later. Pure; the time comes in.
"""

from __future__ import annotations

import functools
import re
import zoneinfo
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAX_WINDOWS = 16
MAX_TEXT = 128
# A device label whose key is this, or begins with this and a dash, holds a window.
LABEL = "maintenance-window"
_FORM = re.compile(
    r"(?:(?P<days>[a-z+-]+)@)?(?P<begin>\d\d:\d\d)-(?P<end>\d\d:\d\d)(?:@(?P<zone>[A-Za-z0-9_/+-]+))?"
)


@dataclass(frozen=True)
class Window:
    """`days` are numbers from Monday = 0; minutes of the day, `end` <= `begin` is the next day."""

    days: frozenset[int]
    begin: int
    end: int
    zone: str | None  # None: the device's own

    @property
    def minutes(self) -> int:
        return self.end - self.begin if self.end > self.begin else self.end + 1440 - self.begin


def parse_window(text: str) -> Window:
    """Raises ValueError saying how one is written."""
    match = _FORM.fullmatch(text.strip().replace(" ", "@")) if len(text) <= MAX_TEXT else None
    if match is None:
        raise ValueError(
            f"window {text[:80]!r}: write HH:MM-HH:MM, mon-fri@HH:MM-HH:MM or "
            "sat+sun@HH:MM-HH:MM@Europe/Berlin"
        )
    zone = match["zone"]
    if zone is not None:
        _zone(zone)
    begin, end = _minute(match["begin"], text), _minute(match["end"], text)
    if begin == end or begin == 1440:
        raise ValueError(f"window {text!r} is empty; all day is 00:00-24:00")
    return Window(_days(match["days"], text), begin, end, zone)


def parse_windows(texts: Iterable[str]) -> tuple[Window, ...]:
    """Raises ValueError for the first that cannot be read, or too many."""
    found = tuple(map(parse_window, texts))
    if len(found) > MAX_WINDOWS:
        raise ValueError(f"at most {MAX_WINDOWS} windows, not {len(found)}")
    return found


def is_open(windows: Iterable[Window], at: float, local: tzinfo) -> bool:
    """Whether one of them is at Unix time `at`; `local` is the device's time zone."""
    return any(_opening(w, at, local) <= at for w in windows)


def next_opening(windows: Iterable[Window], at: float, local: tzinfo) -> float:
    """The first Unix time from `at` on at which one is open. At least one window is given."""
    return max(at, min(_opening(w, at, local) for w in windows))


def windows_of(labels: Mapping[str, str]) -> tuple[str, ...]:
    """Those that device labels hold, in order of the keys."""
    keys = sorted(k for k in labels if k == LABEL or k.startswith(f"{LABEL}-"))
    return tuple(labels[k] for k in keys[:MAX_WINDOWS])


def _opening(window: Window, at: float, local: tzinfo) -> float:
    """When the window that is open at `at` began, else when the next one begins."""
    zone = local if window.zone is None else _zone(window.zone)
    today = datetime.fromtimestamp(at, zone).date()
    for offset in range(-1, 9):
        day = today + timedelta(days=offset)
        if day.weekday() not in window.days:
            continue
        midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
        begin = _unix(midnight, window.begin)
        if at < _unix(midnight, window.begin + window.minutes):
            return begin
    raise AssertionError("a window opens at least once a week")


def _unix(midnight: datetime, minutes: int) -> float:
    """Wall-clock minutes after a midnight, which clock changes may stretch or shorten."""
    wall = midnight.replace(tzinfo=None) + timedelta(minutes=minutes)
    return wall.replace(tzinfo=midnight.tzinfo).astimezone(timezone.utc).timestamp()


def _days(text: str | None, whole: str) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split("+"):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"window {whole[:80]!r}: days are {', '.join(DAYS)}, mon-fri, sat+sun")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        found |= {(begin + n) % 7 for n in range((end - begin) % 7 + 1)}
    return frozenset(found)


def _minute(text: str, whole: str) -> int:
    hours, minutes = int(text[:2]), int(text[3:])
    if minutes > 59 or hours * 60 + minutes > 1440:
        raise ValueError(f"window {whole[:80]!r}: {text} is no time of day")
    return hours * 60 + minutes


@functools.cache
def _zone(name: str) -> tzinfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as e:
        raise ValueError(
            f"time zone {name[:60]!r} is not known here; use a name such as Europe/Berlin"
        ) from e
