"""One form of log lines for every service."""

from __future__ import annotations

import json
import logging

import pytest

from remora_contract.errors import RequestInvalid
from remora_contract.structured_logs import JsonFormatter, set_up


def line(name: str, /, **extra: object) -> dict[str, object]:
    record = logging.makeLogRecord({"msg": name, "levelname": "INFO", "created": 0.0, **extra})
    return json.loads(JsonFormatter().format(record))


def test_a_line_is_an_object_with_what_the_event_carries():
    assert line("artifact.fetched", bytes=7, path={1}) == {
        "at": "1970-01-01T00:00:00.000+00:00",
        "level": "info",
        "event": "artifact.fetched",
        "bytes": 7,
        "path": "{1}",
    }


def test_an_event_cannot_forge_its_own_name_or_time():
    forged = line("artifact.fetched", event="other", at="never")
    assert forged["event"] == "artifact.fetched"
    assert forged["at"] == "1970-01-01T00:00:00.000+00:00"


def test_an_unknown_level_is_refused_by_name():
    with pytest.raises(RequestInvalid, match="debug, info, warning, error, not 'loud'"):
        set_up("loud")
