"""What keeps a release that is ready from switching: the device's maintenance windows, and locks
that applications hold.

Windows hold only what leads forward: a way back never waits for the night. Locks hold every
switch, but all of them together no longer than `max_lock_s` for one assignment; going back from an
unhealthy soak is never held. `hold_of` decides; `Holds` keeps in state.db what it needs.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo

from remora_agent.control.activation import Record
from remora_agent.control.state import Database
from remora_agent.update_locks import LockBook, UpdateLock
from remora_contract.device_phase import Phase
from remora_contract.errors import Exhausted
from remora_contract.windows import is_open, next_opening, parse_windows

log = logging.getLogger(__name__)
_WINDOWS, _HELD_SINCE = "maintenance_windows", "locked_since"


@dataclass(frozen=True)
class Hold:
    why: str  # for people
    until_unix_s: float | None  # None: until somebody changes something


def local_zone() -> tzinfo:
    """The device's own, with the offset that holds now."""
    return datetime.now(timezone.utc).astimezone().tzinfo or timezone.utc


def hold_of(
    is_rollback: bool,
    windows: Sequence[str],
    locks: Sequence[UpdateLock],
    lock_limit_unix_s: float,
    now_unix_s: float,
    local: tzinfo,
) -> Hold | None:
    """Why a switch waits, or None. `lock_limit_unix_s`: when locks stop to count."""
    if windows and not is_rollback:
        try:
            parsed = parse_windows(windows)
        except ValueError as e:
            return Hold(f"its maintenance window cannot be read: {e}", None)
        if not is_open(parsed, now_unix_s, local):
            opens = next_opening(parsed, now_unix_s, local)
            when = datetime.fromtimestamp(opens, local).isoformat(timespec="minutes")
            return Hold(f"outside its maintenance window, which opens {when}", opens)
    if locks and now_unix_s < lock_limit_unix_s:
        last = max(locks, key=lambda lock: lock.until_unix_s)
        reason = f" ({last.reason})" if last.reason else ""
        until = min(last.until_unix_s, lock_limit_unix_s)
        return Hold(f"locked by {last.owner}{reason}", until)
    return None


class Holds:
    """`now` is Unix time; `zone` is asked each time, a device may be moved."""

    def __init__(
        self,
        database: Database,
        locks: LockBook,
        now: Callable[[], float],
        zone: Callable[[], tzinfo] = local_zone,
    ) -> None:
        self._database, self._locks, self._now, self._zone = database, locks, now, zone
        self._windows = _stored_windows(database)
        self._since = _stored_since(database)

    def set_windows(self, windows: Sequence[str]) -> None:
        """What the controller says now. Raises Exhausted when the disk is full."""
        if tuple(windows) != self._windows:
            self._database.set_facts({_WINDOWS: json.dumps(list(windows))})
            self._windows = tuple(windows)

    def holding(self, record: Record | None) -> Hold | None:
        """Why the record's switch waits; None when it need not, or there is none to wait."""
        if record is None or record.phase is not Phase.WAIT_WINDOW:
            return None
        now, locks = self._now(), self._locks.locks()
        limit = now + self._locks.max_lock_s
        if locks:
            limit = self._held_since(record.desired.generation, now) + self._locks.max_lock_s
        is_rollback = record.desired.is_rollback
        return hold_of(is_rollback, self._windows, locks, limit, now, self._zone())

    def _held_since(self, generation: int, now: float) -> float:
        """When locks first held this generation up; a clock put back begins again."""
        known_generation, since = self._since
        if known_generation == generation and since <= now:
            return since
        self._since = (generation, now)
        try:
            self._database.set_facts({_HELD_SINCE: json.dumps(self._since)})
        except Exhausted as e:  # a restart would begin to count again, no more
            log.error("state_dir.full", extra={"cause": str(e)})
        return now


def _stored_since(database: Database) -> tuple[int, float]:
    text = database.fact(_HELD_SINCE)
    generation, since = json.loads(text) if text else (0, 0.0)
    return int(generation), float(since)


def _stored_windows(database: Database) -> tuple[str, ...]:
    text = database.fact(_WINDOWS)
    return tuple(json.loads(text)) if text else ()
