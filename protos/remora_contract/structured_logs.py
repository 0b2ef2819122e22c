"""Structured logs of a service: a JSON object a line on stderr, from `log.info(event, extra={…})`.

Owns the format only; libraries log events and never configure anything.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

from remora_contract.errors import RequestInvalid

LEVELS = ("debug", "info", "warning", "error")
# uvicorn repeats its message in color.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class JsonFormatter(logging.Formatter):
    """at, level, event, then whatever the event carries; values that are not JSON become text."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, tz=timezone.utc)
        carried = {k: v for k, v in vars(record).items() if k not in _STANDARD}
        line: dict[str, object] = {
            **carried,
            "at": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(level: str) -> None:
    """For the whole process. Raises RequestInvalid for a level that is not one of LEVELS."""
    if level not in LEVELS:
        raise RequestInvalid(f"--log-level is one of {', '.join(LEVELS)}, not {level!r}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
