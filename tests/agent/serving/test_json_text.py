"""JSON of a caller as a value, whatever the caller means by it."""

from __future__ import annotations

import json
import time

import pytest

from remora_agent.serving.json_text import json_table, json_value
from remora_contract.errors import RequestInvalid

KEYS = 100_000


def many_keys(*more: str) -> str:
    return "{" + ",".join([*(f'"{i:x}":0' for i in range(KEYS)), *more]) + "}"


def test_a_key_given_twice_behind_many_others_is_found_in_one_pass():
    """Looked for anew for each key, it would keep the agent busy for minutes."""
    began = time.thread_time()
    with pytest.raises(RequestInvalid, match="'z' is given twice"):
        json_value(many_keys('"z":1', '"z":2'), "the body")
    assert time.thread_time() - began < 5


def test_many_keys_that_are_all_different_are_taken():
    text = many_keys()
    assert json_table(text, "the body") == json.loads(text)
