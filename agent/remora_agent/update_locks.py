"""Locks by which applications ask that the release is not switched now: one file, whole or absent.

The serving side writes it, the control side reads it (`control.holds`): they share nothing else.
Each lock ends by itself; times are Unix seconds, because they outlive the process. A file that
cannot be read is no lock: updates must not stop for ever because of a damaged file.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from remora_contract.errors import DocumentInvalid, Exhausted, NotFound, Refused, RequestInvalid
from remora_contract.strict import loads

log = logging.getLogger(__name__)
FILE_NAME = "update_locks.json"
MAX_LOCKS = 32
MAX_TEXT = 128
_MAX_BYTES = 256 << 10  # of MAX_LOCKS locks with the longest texts, each character escaped


@dataclass(frozen=True)
class UpdateLock:
    owner: str
    reason: str
    until_unix_s: float


@dataclass(frozen=True)
class _Document:
    locks: tuple[UpdateLock, ...] = ()


class LockBook:
    """Thread-safe within one process; only one process writes."""

    def __init__(self, path: Path, unix_now: Callable[[], float], max_lock_s: float) -> None:
        self._path, self._unix_now, self.max_lock_s = path, unix_now, max_lock_s
        self._writing = threading.Lock()

    def lock(self, owner: str, reason: str, for_s: float) -> tuple[UpdateLock, ...]:
        """Takes or replaces the owner's lock; all that hold now.

        Raises RequestInvalid (no owner, a time out of range), Exhausted (too many owners),
        Refused (the file cannot be written).
        """
        if not 0 < len(owner) <= MAX_TEXT or len(reason) > MAX_TEXT or not owner.isprintable():
            raise RequestInvalid(f"a lock names its owner and a reason, {MAX_TEXT} characters each")
        if not 0 < for_s <= self.max_lock_s:
            raise RequestInvalid(
                f"a lock lasts more than 0 and at most {self.max_lock_s:g} s (limits.max_lock_s)"
            )
        with self._writing:
            others = tuple(x for x in self.locks() if x.owner != owner)
            if len(others) >= MAX_LOCKS:
                raise Exhausted(f"{MAX_LOCKS} others hold a lock already; try again later", 60.0)
            return self._write((*others, UpdateLock(owner, reason, self._unix_now() + for_s)))

    def unlock(self, owner: str) -> tuple[UpdateLock, ...]:
        """Raises NotFound when the owner holds none."""
        with self._writing:
            held = self.locks()
            if all(x.owner != owner for x in held):
                raise NotFound(f"{owner[:MAX_TEXT]} holds no lock on updates")
            return self._write(tuple(x for x in held if x.owner != owner))

    def locks(self) -> tuple[UpdateLock, ...]:
        """Those that hold now. A lock cannot reach further than the maximum, whatever the file or
        a clock that was put back says."""
        now = self._unix_now()
        found = self._read()
        return tuple(x for x in found if now < x.until_unix_s <= now + self.max_lock_s)

    def _read(self) -> tuple[UpdateLock, ...]:
        try:
            with self._path.open("rb") as f:
                data = f.read(_MAX_BYTES)
            return loads(_Document, data, str(self._path)).locks
        except FileNotFoundError:
            return ()
        except (OSError, DocumentInvalid) as e:
            log.error("update_locks.unreadable", extra={"cause": str(e)})
            return ()

    def _write(self, locks: tuple[UpdateLock, ...]) -> tuple[UpdateLock, ...]:
        document = json.dumps(asdict(_Document(locks)))
        temporary = self._path.with_name(f".{self._path.name}.new")
        try:
            with temporary.open("w") as f:
                f.write(document)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(self._path)
        except OSError as e:
            raise Refused(f"{self._path} cannot be written: {e.strerror}") from e
        return locks
