"""The agent's own log, kept in its state directory for whoever asks from afar.

Two files of half the bytes each, the older one replaced. Prompts and answers, which a request log
may hold, stay out.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

from remora_contract.errors import Refused
from remora_contract.structured_logs import JsonFormatter

log = logging.getLogger(__name__)
PRIVATE = ("prompt", "answer")
_LEFT_OUT = "(left out)"
_LAST_LINES, _LAST_LINE_CHARS = 5, 300  # fit together into what a device reports


class _WithoutTexts(JsonFormatter):
    def format(self, record: logging.LogRecord) -> str:
        if not any(hasattr(record, name) for name in PRIVATE):
            return super().format(record)
        shown = logging.makeLogRecord(
            {**vars(record), **{n: _LEFT_OUT for n in PRIVATE if hasattr(record, n)}}
        )
        return super().format(shown)


class _Keeper(RotatingFileHandler):
    """A full disk costs lines of this log and nothing else; that is logged once."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._has_failed:
            self._has_failed = True  # before the next line, which comes here again
            log.warning("kept_log.failed", extra={"cause": repr(sys.exc_info()[1])})


@contextmanager
def keeping_log(path: Path, limit_bytes: int) -> Iterator[None]:
    """While it is open, what is logged is kept in `path` too. A limit of 0 keeps nothing."""
    if limit_bytes == 0:
        for old in _files(path):
            old.unlink(missing_ok=True)
        yield
        return
    path.parent.mkdir(mode=0o750, exist_ok=True)
    handler = _Keeper(path, maxBytes=max(1, limit_bytes // 2), backupCount=1, encoding="utf-8")
    handler.setFormatter(_WithoutTexts())
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def kept_lines(path: Path, since_unix_s: float) -> bytes:
    """Lines from then on, the oldest first. Raises Refused where no log is kept."""
    if not any(file.exists() for file in _files(path)):
        raise Refused(
            "this agent keeps no log (telemetry.kept_log_bytes is 0); look into its journal"
        )
    lines = b"".join(file.read_bytes() for file in _files(path) if file.exists())
    if since_unix_s <= 0:
        return lines
    return b"".join(line for line in lines.splitlines(True) if _at(line) >= since_unix_s)


def last_lines(path: Path) -> str:
    """The newest lines, each cut to what a report has room for; "" where none are kept."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (64 << 10)))
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(line[:_LAST_LINE_CHARS] for line in lines[-_LAST_LINES:])


def _at(line: bytes) -> float:
    """Infinity for a line that does not say: better one too many."""
    try:
        return datetime.fromisoformat(json.loads(line)["at"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _files(path: Path) -> tuple[Path, Path]:
    """The older one first."""
    return path.with_name(path.name + ".1"), path
