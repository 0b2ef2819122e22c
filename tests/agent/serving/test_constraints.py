"""Constraints over a real gRPC server, driven by the product's own client."""

from __future__ import annotations

import json
import re

import pytest

from remora_agent.client import FinishReason
from remora_agent.client.requests import generate_request
from remora_agent.serving import driver
from remora_contract.errors import RequestInvalid

OPTIONS = {"max_tokens": 150, "temperature": 1.0, "seed": 1}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "maximum": 99}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)])
def test_an_answer_to_a_schema_validates_with_any_adapter(served, schema):
    for adapter in (None, "a", {"a": 0.5, "b": 0.5}):
        bounded = SCHEMA["properties"]["count"] | {"minimum": 0}
        made = {**SCHEMA, "properties": {**SCHEMA["properties"], "count": bounded}}
        wanted = made if isinstance(schema, dict) else json.dumps(made)
        result = served.client.generate("x", adapter=adapter, json_schema=wanted, **OPTIONS)
        if result.finish_reason is FinishReason.STOP:
            value = json.loads(result.text)
            assert value["kind"] in ("a", "b") and 0 <= value["count"] <= 99


def test_a_stream_of_several_answers_matches_piece_by_piece(served):
    stream = served.client.stream("x", regex="[äöü日本]{20}", n=3, **OPTIONS)
    texts = ["", "", ""]
    for delta in stream:
        texts[delta.choice] += delta.text
        assert "\ufffd" not in delta.text
    assert all(re.fullmatch("[äöü日本]{20}", text) for text in texts)
    assert stream.result.finish_reason is FinishReason.STOP


def test_choice_lark_and_any_object(served):
    client = served.client
    assert client.generate("x", choice=["ja", "nein"], **OPTIONS).text in ("ja", "nein")
    assert client.generate("x", lark='start: "a" | "b" "c"', **OPTIONS).text in ("a", "bc")
    assert client.generate("x", json_object=True, **OPTIONS).text.startswith("{")


def test_a_stop_string_inside_a_constrained_answer_still_ends_it(served):
    result = served.client.generate("x", regex="abcdef", stop="cd", **OPTIONS)
    assert (result.text, result.stop_match) == ("ab", "cd")


def test_what_is_wrong_with_a_grammar_is_told_at_once_and_nothing_stays(served):
    with pytest.raises(RequestInvalid, match="unclosed"):
        served.client.generate("x", regex="(a", **OPTIONS)
    with pytest.raises(RequestInvalid, match="Unimplemented keys"):
        served.client.stream("x", json_schema={"type": "string", "not": {}}, **OPTIONS)
    assert served.client.status().queued == 0


def test_two_constraints_are_refused_by_the_client(served):
    with pytest.raises(RequestInvalid, match="regex or lark"):
        served.client.generate("x", regex="a", lark="b", **OPTIONS)


def test_ignoring_the_end_is_refused_beside_a_constraint(served):
    with pytest.raises(RequestInvalid, match="ignore_eos"):
        served.client.generate("x", regex="a", ignore_eos=True, **OPTIONS)


def test_a_grammar_that_compiles_for_too_long_is_given_up(served, monkeypatch):
    monkeypatch.setattr(driver, "COMPILE_TIMEOUT_S", 0.0)
    with pytest.raises(RequestInvalid, match="takes longer"):
        served.client.generate("x", regex="a never seen expression", **OPTIONS)


def test_a_constraint_of_the_clients_is_what_its_name_says():
    one = generate_request("x", {"choice": "yes"}).constraint
    assert list(one.choice.options) == ["yes"]
    for name in ("regex", "lark"):
        with pytest.raises(RequestInvalid, match=name):
            generate_request("x", {name: {"type": "object"}})
