"""Every field of OpenAI's requests is known, and everything wrong is named."""

from __future__ import annotations

import json
import socket
from contextlib import suppress

import openai
import pytest
from openai.types import EmbeddingCreateParams, completion_create_params
from openai.types.chat import completion_create_params as chat_params

from remora_agent.serving.openai.chat_request import chat_request
from remora_agent.serving.openai.completion_request import completion_request
from remora_agent.serving.openai.embeddings import embedding_request
from remora_agent.serving.openai.errors import (
    FieldInvalid,
    error_object,
    headers_of,
    status_of,
)
from remora_contract.errors import (
    Exhausted,
    PromptTooLong,
    RemoraError,
    Unavailable,
    Unsupported,
    all_errors,
)

CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}]}
PLAIN = {"model": "base", "prompt": "x"}


READERS = [
    (chat_request, CHAT, chat_params.CompletionCreateParamsBase),
    (completion_request, PLAIN, completion_create_params.CompletionCreateParamsBase),
    (embedding_request, {"model": "base", "input": "x"}, EmbeddingCreateParams),
]


@pytest.mark.parametrize(
    ("read", "plain", "field"),
    [(read, plain, f) for read, plain, cls in READERS for f in sorted(cls.__annotations__)],
)
def test_no_field_of_the_openai_client_is_unknown_here(read, plain, field):
    with suppress(RemoraError):
        read(plain | {field: plain.get(field, ["nonsense"])})
        return
    with pytest.raises(RemoraError) as caught:
        read(plain | {field: ["nonsense"]})
    assert field in str(caught.value) and "unknown" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]),
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("reasoning_effort", "low"),
        ("verbosity", "high"),
        ("web_search_options", {}),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("service_tier", "flex"),
        ("safety_identifier", "x"),
        ("prompt_cache_key", "x"),
        ("prompt_cache_retention", "24h"),
        ("moderation", {"model": "x"}),
        ("chat_template", "{{ 1 }}"),
        ("continue_final_message", True),
        ("use_beam_search", True),
        ("skip_special_tokens", False),
        ("include_stop_str_in_output", True),
        ("bad_words", ["x"]),
        ("truncate_prompt_tokens", 1),
        ("prompt_logprobs", 1),
        ("echo", True),
        ("best_of", 2),
        ("anything_else", 1),
        ("top_P", 1),
    ],
)
def test_what_is_not_supported_is_refused_by_name(http, field, value):
    reply = http.raw.post("/v1/chat/completions", json={**CHAT, field: value})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, field)
    assert error["type"] == "invalid_request_error" and field in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"store": False, "service_tier": "auto", "modalities": ["text"], "metadata": None},
        {"n": 1, "logprobs": False, "logit_bias": {}, "stop": None, "user": None, "tools": []},
        {"response_format": {"type": "text"}, "frequency_penalty": None, "best_of": 1},
        {"stream": False, "stream_options": None, "parallel_tool_calls": True},
        {"top_k": -1, "stop_token_ids": [], "skip_special_tokens": True, "echo": False},
    ],
)
def test_fields_that_ask_for_nothing_are_accepted(fields):
    assert chat_request({**CHAT, **fields}).options.n == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 1e9),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", -2),
        ("min_p", 2),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", -(1 << 70)),
        ("max_completion_tokens", True),
        ("n", 0),
        ("n", 129),
        ("seed", -1),
        ("seed", 1 << 64),
        ("stop", [1]),
        ("stop", {}),
        ("stop_token_ids", ["x"]),
        ("logit_bias", {"x": 1}),
        ("logit_bias", [1]),
        ("presence_penalty", 3),
        ("repetition_penalty", 0),
        ("top_logprobs", 21),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("messages", []),
        ("messages", "hello"),
        ("model", ""),
        ("model", 3),
        ("user", 3),
        ("tool_choice", 3),
        ("tools", [3]),
        ("response_format", "json"),
        ("chat_template_kwargs", []),
        ("use_case_weights", {"a": "x"}),
        ("adapters", {"a": 1e9}),
        ("adapters", {"a": None}),
        ("use_case_weights", {"a": None}),
        ("logit_bias", {"1": None}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {"1": 1, "01": 2}),
    ],
)
def test_a_value_out_of_range_names_its_field(http, field, value):
    reply = http.raw.post("/v1/chat/completions", json={**CHAT, field: value})
    error = reply.json()["error"]
    assert reply.status_code == 400
    assert (error["param"] or "").startswith(field) or field in error["message"]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ("x", "messages[0]"),
        ({"role": "robot", "content": "x"}, "role"),
        ({"role": "function", "name": "f", "content": "x"}, "role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 3}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0]"),
        ({"role": "user", "content": "x", "weight": 1}, "messages[0].weight"),
        ({"role": "assistant", "content": "x", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "user", "content": "x", "tool_call_id": "c"}, "tool_call_id"),
        ({"role": "user", "content": "\ud800"}, "Unicode"),
    ],
)
def test_a_message_that_is_wrong_is_named(http, message, named):
    body = json.dumps({**CHAT, "messages": [message]})
    reply = http.raw.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b'"x"', "object"),
        (b"\xff\xfe", "UTF-8 at byte 0"),
        (b'{"model": "base", "temperature": NaN}', "NaN"),
        (b'{"model": "base", "temperature": Infinity}', "Infinity"),
        (b'{"model": "base", "temperature": 1e999}', "finite"),
        (b'{"model": "base", "model": "a"}', "twice"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "deep"),
        (b"[" * 100_000, "JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"model": "\\ud800"}', "Unicode"),
    ],
)
def test_a_body_that_is_no_plain_json_is_refused(http, body, named):
    headers = {"content-type": "application/json"}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize"):
        reply = http.raw.post(path, content=body, headers=headers)
        assert reply.status_code == 400, path
        assert named in reply.json()["error"]["message"]


def test_a_body_beyond_the_bound_is_refused_before_it_is_kept(http):
    def endless():
        for _ in range(100):
            yield b" " * (1 << 20)

    reply = http.raw.post(
        "/v1/completions", content=endless(), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413
    assert http.raw.get("/health").status_code == 200


def test_a_body_that_says_it_is_beyond_the_bound_is_not_waited_for(http):
    address = http.stack.openai_address
    with socket.create_connection((address.host, address.port), timeout=20) as caller:
        caller.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000000000\r\n\r\n{"
        )
        assert caller.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/json; charset=utf-16", "application/json;charset=x"]
)
def test_only_json_in_utf_8_is_read(http, kind):
    body = b'{"model": "base", "prompt": "x", "max_tokens": 1}'
    headers = {} if kind is None else {"content-type": kind}
    reply = http.raw.post("/v1/completions", content=body, headers=headers)
    assert reply.status_code == 400
    assert "Content-Type" in reply.json()["error"]["message"]
    named = {"content-type": 'application/JSON; charset="UTF-8"'}
    assert http.raw.post("/v1/completions", content=body, headers=named).status_code == 200


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["x", 1]}, "prompt"),
        ({"prompt": [[1], "x"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": ""}, "empty"),
        ({"prompt": ["x"] * 65, "n": 2}, "prompt"),
        ({"prompt": [999_999]}, "vocabulary"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "x"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs"),
        ({"use_case": "both", "adapters": {"a": 1}}, "use_case"),
        ({"use_case_weights": {"a": 1}}, "use_case_weights"),
        ({"model": "a", "adapters": {"b": 1}}, "adapters"),
        ({"model": "a", "use_case": "both"}, "use_case"),
        ({"use_case": "both", "use_case_weights": {"c": 1}}, "use_case_weights"),
    ],
)
def test_a_plain_completion_that_is_wrong_is_named(http, fields, named):
    reply = http.raw.post("/v1/completions", json={**PLAIN, **fields})
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert named in error["message"] or error["param"] == named


def test_an_unknown_model_is_not_found(http):
    for path, body in (("chat/completions", CHAT), ("completions", PLAIN)):
        for stream in (False, True):
            reply = http.raw.post(f"/v1/{path}", json={**body, "model": "who", "stream": stream})
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
            assert reply.json()["error"]["param"] == "model"
    with pytest.raises(openai.NotFoundError):
        http.client.models.retrieve("who")


def test_a_prompt_beyond_the_context_is_told_as_openai_tells_it(http):
    with pytest.raises(openai.BadRequestError) as caught:
        http.client.completions.create(model="base", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"


def test_unknown_paths_and_methods_are_told_in_the_same_shape(http):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/responses", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ):
        reply = http.raw.request(method, path)
        assert reply.status_code == status
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_every_error_has_a_status_and_an_error_object():
    for cls in all_errors():
        error = cls([]) if cls.__name__ == "Incompatible" else cls("why")
        assert 400 <= status_of(error) < 600
        assert set(error_object(error)["error"]) == {"message", "type", "param", "code"}
    assert status_of(RemoraError("x")) == 500
    assert status_of(Unsupported("x")) == status_of(FieldInvalid("x", "f")) == 400
    assert status_of(PromptTooLong("x")) == 400


def test_clients_are_told_when_to_come_back():
    assert headers_of(Exhausted("full", 1.2)) == {"retry-after": "2"}
    assert headers_of(Exhausted("never fits")) == {"x-should-retry": "false"}
    assert "retry-after" in headers_of(Unavailable("draining"))
