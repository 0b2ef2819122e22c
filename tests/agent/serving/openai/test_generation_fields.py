"""What fields of a request do to its answer: constraints, logprobs, biases, forced tools."""

from __future__ import annotations

import json
import math
import re

import openai
import pytest

from remora_agent.client import Client
from remora_agent.serving.openai.logprobs import token_text
from tests.agent.serving.openai.test_tool_chat import TOOLS

CHAT = {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 200}
PLAIN = {"model": "base", "prompt": "abc", "max_tokens": 6, "temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["bug", "wish"]}, "level": {"type": "integer", "maximum": 3}},
    "required": ["kind", "level"],
    "additionalProperties": False,
}
NO_EOS = {"ignore_eos": True}


def chat(http, **fields) -> str:
    return http.client.chat.completions.create(**{**CHAT, **fields}).choices[0].message.content


def test_an_answer_follows_the_schema_it_was_asked_for(http):
    named = {"name": "report", "schema": SCHEMA, "strict": True}
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": named}},
        {"extra_body": {"guided_json": SCHEMA}},
        {"extra_body": {"guided_json": json.dumps(SCHEMA)}},
        {"extra_body": {"structured_outputs": {"json": SCHEMA}}},
    ):
        said = json.loads(chat(http, **fields, temperature=1.5, seed=3))
        assert said["kind"] in ("bug", "wish") and isinstance(said["level"], int)


def test_other_constraints_are_kept_too(http):
    choice = chat(http, extra_body={"guided_choice": ["yes", "no"]})
    assert choice in ("yes", "no")
    assert re.fullmatch("[a-c]{5}", chat(http, extra_body={"guided_regex": "[a-c]{5}"}))
    lark = chat(http, extra_body={"structured_outputs": {"grammar": 'start: "a" "b"+ "c"'}})
    assert re.match("ab+", lark)
    begun = chat(http, response_format={"type": "json_object"}, temperature=1.0, seed=1)
    assert begun.lstrip().startswith("{")


def test_what_asks_for_no_form_stands_beside_a_constraint(http):
    free = {"type": "text"}
    assert chat(http, response_format=free, extra_body={"guided_choice": ["yes"]}) == "yes"
    idle = {"choice": ["no"], "regex": None, "disable_any_whitespace": False, "json": None}
    assert chat(http, extra_body={"structured_outputs": idle}) == "no"
    for extra in (
        {"structured_outputs": {"choice": ["no"], "disable_any_whitespace": True}},
        {"structured_outputs": {"choice": ["no"], "whitespace_pattern": " "}},
        {"response_format": {"type": "json_object"}, "guided_choice": ["yes"]},
    ):
        with pytest.raises(openai.BadRequestError):
            chat(http, extra_body=extra)


def test_a_constraint_that_is_none_is_refused(http):
    for extra in (
        {"guided_regex": "("},
        {"guided_regex": "ab\\"},
        {"guided_grammar": "nonsense"},
        {"guided_json": "{"},
    ):
        with pytest.raises(openai.BadRequestError):
            chat(http, extra_body=extra)


def test_a_forced_tool_is_called_with_valid_arguments(scripted_noise):
    http = scripted_noise
    named = {"type": "function", "function": {"name": "forecast"}}
    for choice, names in (("required", {"weather", "forecast"}), (named, {"forecast"})):
        reply = http.client.chat.completions.create(
            **{**CHAT, "model": "hermes", "max_tokens": 400},
            tools=SHORT_TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            temperature=1.0,
            seed=5,
        ).choices[0]
        assert reply.finish_reason == "tool_calls" and reply.message.content is None
        (call,) = reply.message.tool_calls
        assert call.function.name in names
        assert json.loads(call.function.arguments)["day"] in ("today", "tomorrow")


SHORT_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": tool["function"]["name"],
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"day": {"enum": ["today", "tomorrow"]}},
                "required": ["day"],
                "additionalProperties": False,
            },
        },
    }
    for tool in TOOLS
]


def test_logprobs_of_a_chat_have_openais_shape(http):
    fields = {**CHAT, "max_tokens": 6, "extra_body": NO_EOS}
    reply = http.client.chat.completions.create(**fields, logprobs=True, top_logprobs=3)
    scored = reply.choices[0].logprobs.content
    assert len(scored) == 6
    for token in scored:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        values = [t.logprob for t in token.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert token_text(bytes(token.bytes)) == token.token
    raw = bytes(b for token in scored for b in token.bytes)
    text = raw.replace(b"<eos>", b"").decode(errors="replace")
    assert text == reply.choices[0].message.content
    bare = http.client.chat.completions.create(**fields, logprobs=True)
    assert bare.choices[0].logprobs.content[0].top_logprobs == []
    streamed = []
    for chunk in http.client.chat.completions.create(**fields, logprobs=True, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [t.logprob for t in streamed] == [t.logprob for t in scored]


def test_logprobs_of_a_completion_have_openais_shape(http):
    reply = http.client.completions.create(**PLAIN, logprobs=2, extra_body=NO_EOS).choices[0]
    scored = reply.logprobs
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == 6
    assert scored.text_offset[0] == 0
    assert scored.text_offset == sorted(scored.text_offset)
    assert scored.text_offset[-1] <= len(reply.text)
    for token, value, top in zip(
        scored.tokens, scored.token_logprobs, scored.top_logprobs, strict=True
    ):
        assert len(top) == 2
        assert math.isclose(top[token], value)  # greedy: the likeliest
    none = http.client.completions.create(**PLAIN, logprobs=0, extra_body=NO_EOS).choices[0]
    assert none.logprobs.top_logprobs is None
    assert none.logprobs.token_logprobs == scored.token_logprobs


def test_a_bias_decides_and_a_penalty_turns_away(http):
    with Client(http.grpc) as client:
        (token,) = client.tokenize("q").ids
    reply = http.client.completions.create(**PLAIN, logit_bias={str(token): 100}, extra_body=NO_EOS)
    assert reply.choices[0].text == "q" * 6
    penalised = http.client.completions.create(
        **PLAIN,
        logit_bias={str(token): 100},
        extra_body={**NO_EOS, "repetition_penalty": 90},
    )
    assert penalised.choices[0].text != "q" * 6


def test_min_tokens_keep_an_answer_going(http):
    with Client(http.grpc) as client:
        ids = client.generate("abc", max_tokens=6, temperature=0.0, ignore_eos=True).token_ids
    fields = {**PLAIN, "extra_body": {"stop_token_ids": [ids[0]], "min_tokens": 3}}
    assert http.client.completions.create(**fields).usage.completion_tokens >= 3


def test_a_prompt_that_is_repeated_with_logprobs_is_scored_too(http):
    reply = http.client.completions.create(**PLAIN, echo=True, logprobs=1, extra_body=NO_EOS)
    scored = reply.choices[0].logprobs
    assert reply.choices[0].text.startswith("abc")
    assert scored.tokens[:3] == ["a", "b", "c"] and len(scored.tokens) == 3 + 6
    assert scored.token_logprobs[0] is None
    assert all(value <= 0 for value in scored.token_logprobs[1:])
    plain = http.client.completions.create(**PLAIN, logprobs=1, extra_body=NO_EOS)
    assert scored.token_logprobs[3:] == plain.choices[0].logprobs.token_logprobs


def test_a_forced_tool_reaches_our_own_client_as_a_call(scripted_noise):
    with Client(scripted_noise.grpc) as client:
        result = client.generate(
            messages=[{"role": "user", "content": "x"}],
            tools=SHORT_TOOLS,
            tool_choice="required",
            max_tokens=600,
            n=2,
            temperature=1.0,
            seed=1,
        )
    for answer in (result, *result.more):
        # Noise never stops calling: the last call may be cut off, and is text then.
        assert "<tool_call>" not in answer.text.lstrip().removeprefix("<tool_call>")
        assert json.loads(answer.tool_calls[0].arguments_json)["day"] in ("today", "tomorrow")
