"""Tools in a chat, through the openai client and our own."""

from __future__ import annotations

import json

import openai
import pytest

from remora_agent.client import Client
from remora_agent.serving.openai.settings import OpenAiOptions
from remora_contract.errors import RequestInvalid
from tests.agent.serving.openai.conftest import HERMES, LOOPBACK
from tests.support.runtime import byte_tokenizer
from tests.support.scripted_engine import ScriptedEngines
from tests.support.serving import ReferenceEngines, World, running_stack, write_bundle

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Looks the weather up.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "forecast")
]
ASK = {"model": "hermes", "messages": [{"role": "user", "content": "Weather?"}], "max_tokens": 300}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
TWO = f'One moment.\n{CALL}\n<tool_call>{{"name": "forecast", "arguments": {{}}}}</tool_call>'


def ask(scripted, **fields):
    return scripted.client.chat.completions.create(**{**ASK, "tools": TOOLS, **fields})


def test_calls_leave_the_text_and_are_told_as_calls(scripted):
    scripted.says(TWO)
    reply = ask(scripted).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content == "One moment."
    first, second = reply.message.tool_calls
    assert (first.function.name, json.loads(first.function.arguments)) == (
        "weather",
        {"city": "Köln"},
    )
    assert (second.function.name, second.function.arguments) == ("forecast", "{}")
    assert first.id != second.id and first.id.startswith("call_")


def test_a_stream_tells_the_name_first_and_never_the_markup(scripted):
    scripted.says(TWO)
    content, calls, reasons = "", {}, []
    for chunk in ask(scripted, stream=True):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for part in choice.delta.tool_calls or []:
            if part.index not in calls:
                assert part.id and part.function.name and not part.function.arguments
                calls[part.index] = [part.function.name, ""]
            else:
                calls[part.index][1] += part.function.arguments
    assert content == "One moment."
    assert calls == {0: ["weather", '{"city": "Köln"}'], 1: ["forecast", "{}"]}
    assert reasons[-1] == "tool_calls"


def test_an_answer_that_stops_within_a_call_has_not_called(scripted):
    """A client that acts on tool_calls would parse half a document."""
    scripted.says(CALL)
    whole = ask(scripted, stop='": "K').choices[0]
    *chunks, last = (c.choices[0] for c in ask(scripted, stop='": "K', stream=True))
    parts = [p for c in chunks for p in c.delta.tool_calls or []]

    assert "".join(p.function.arguments for p in parts) == '{"city'
    assert (whole.finish_reason, last.finish_reason) == ("stop", "stop")
    assert whole.message.tool_calls is None
    assert whole.message.content.endswith('{"city')


def test_a_stream_that_stops_within_its_second_call_has_not_called(scripted):
    """The first one alone is all that an answer told at once has."""
    scripted.says(TWO.replace("{}", '{"day": "x"}'))
    whole = ask(scripted, stop='day": "').choices[0]
    *_, last = (c.choices[0] for c in ask(scripted, stop='day": "', stream=True))

    assert whole.finish_reason == "tool_calls"
    assert [c.function.name for c in whole.message.tool_calls] == ["weather"]
    assert last.finish_reason == "stop"


def test_a_stop_string_behind_a_call_leaves_it_called(scripted):
    scripted.says(f"{CALL} Done.")
    fields = {"stop": "Done"}
    whole = ask(scripted, **fields).choices[0]
    *_, last = (c.choices[0] for c in ask(scripted, stream=True, **fields))
    assert (whole.finish_reason, last.finish_reason) == ("tool_calls", "tool_calls")


def test_only_a_call_gives_no_content_at_all(scripted):
    scripted.says(CALL)
    assert ask(scripted).choices[0].message.content is None


def test_what_is_no_valid_call_stays_content(scripted):
    for text in ("<tool_call>{oops}</tool_call>", CALL.replace("weather", "unknown")):
        scripted.says(text)
        reply = ask(scripted).choices[0]
        assert (reply.message.content, reply.message.tool_calls) == (text, None)
        assert reply.finish_reason == "stop"


def test_without_tools_or_with_choice_none_markup_is_plain_text(scripted):
    scripted.says(CALL)
    without = scripted.client.chat.completions.create(**ASK).choices[0]
    none = ask(scripted, tool_choice="none").choices[0]
    assert without.message.content == none.message.content == CALL
    assert without.finish_reason == none.finish_reason == "stop"


STRICT = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Köln"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("fields", [{}, {"tool_choice": "auto"}])
def test_a_strict_tool_is_held_to_its_schema_where_the_model_is_free_to_call(scripted, fields):
    """The engine would write another city, character for character."""
    scripted.says(CALL.replace("Köln", "Bonn"))
    reply = ask(scripted, tools=[STRICT], **fields).choices[0]
    assert (reply.finish_reason, reply.message.content) == ("tool_calls", None)
    (call,) = reply.message.tool_calls
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Köln")


def test_only_the_strict_ones_of_several_tools_are_held(scripted):
    scripted.says(TWO.replace("{}", '{"city": [1, {"any": null}]}'))
    calls = ask(scripted, tools=[STRICT, TOOLS[1]]).choices[0].message.tool_calls
    assert [json.loads(c.function.arguments) for c in calls] == [
        {"city": "Köln"},
        {"city": [1, {"any": None}]},
    ]


def test_answers_that_only_look_like_a_call_pass_a_strict_tool_to_the_letter(scripted):
    for text in ('A tag is <tool_call and {"name": "weather", "arguments": {', "<tool", "Fine. 🐟"):
        scripted.says(text)
        reply = ask(scripted, tools=[STRICT]).choices[0]
        assert (reply.message.content, reply.finish_reason) == (text, "stop")
        chunks = [c.choices[0] for c in ask(scripted, tools=[STRICT], stream=True)]
        assert "".join(c.delta.content or "" for c in chunks) == text


def test_a_stream_of_a_strict_tool_tells_text_and_held_arguments(scripted):
    scripted.says(f"One moment.\n{CALL.replace('Köln', 'Bonn')} Done.")
    chunks = [c.choices[0] for c in ask(scripted, tools=[STRICT], stream=True)]
    parts = [p for c in chunks for p in c.delta.tool_calls or []]
    arguments = json.loads("".join(p.function.arguments or "" for p in parts))
    assert arguments["city"] in ("Rome", "Köln")
    assert "".join(c.delta.content or "" for c in chunks).startswith("One moment.")
    assert chunks[-1].finish_reason == "tool_calls"


def test_a_random_model_pushed_to_call_writes_valid_calls_of_a_strict_tool(tmp_path):
    """Its marker is one special token, as in the models that have it; the rest is noise."""
    world, engines = World(tmp_path), ReferenceEngines()
    folder = tmp_path / "b" / "m"
    world.bundles["m"] = write_bundle(folder, "m", 1024, HERMES, "<tool_call>")
    marker = str(byte_tokenizer("<tool_call>").token_to_id("<tool_call>"))
    with running_stack(tmp_path, engines, openai=OpenAiOptions(LOOPBACK)) as (stack, _):
        stack.host.switch(world.assignment(bundle="m"))
        url = f"http://{stack.openai_address.target()}/v1"
        fields = {**ASK, "model": "m", "tools": [STRICT], "logit_bias": {marker: 60}}
        with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as client:
            for seed in range(4):
                asked = {**fields, "seed": seed, "temperature": 1.0}
                calls = client.chat.completions.create(**asked).choices[0].message.tool_calls
                assert calls, "it was pushed hard"
                for call in calls:
                    found = json.loads(call.function.arguments)
                    assert found in ({"city": "Rome"}, {"city": "Köln"})


def test_a_format_that_no_grammar_holds_refuses_strict_by_name(tmp_path):
    template = "{{ tools }}<|python_tag|>{{ messages[0].content }}"
    world, engines = World(tmp_path), ScriptedEngines()
    world.bundles["m"] = write_bundle(tmp_path / "b" / "m", "m", 1024, template)
    with running_stack(tmp_path, engines, openai=OpenAiOptions(LOOPBACK)) as (stack, _):
        stack.host.switch(world.assignment(bundle="m"))
        url = f"http://{stack.openai_address.target()}/v1"
        client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
        refused = pytest.raises(openai.BadRequestError, match=r"strict of weather.*\(llama\)")
        with client, refused:
            client.chat.completions.create(**{**ASK, "model": "m"}, tools=[STRICT])


def test_one_call_at_most_where_parallel_calls_are_off(scripted):
    scripted.says(TWO)
    reply = ask(scripted, parallel_tool_calls=False).choices[0]
    assert [c.function.name for c in reply.message.tool_calls] == ["weather"]


def test_a_whole_conversation_with_tools_reaches_the_template(scripted):
    scripted.says(CALL)
    message = ask(scripted).choices[0].message
    messages = [
        *ASK["messages"],
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"},
    ]
    tokens = scripted.client.post(
        "/../tokenize", body={"messages": messages, "tools": TOOLS}, cast_to=object
    )["tokens"]
    with Client(scripted.grpc) as client:
        text = client.detokenize(tokens)
    tools = "".join(json.dumps(t) + "\n" for t in TOOLS)
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
    assert text == (
        f"s:{tools}Answer with <tool_call></tool_call>.\nu:Weather?\na:{call}\n"
        f"t:sunny({message.tool_calls[0].id})\na:"
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "listed twice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "nobody"),
        ({"tools": [], "tool_choice": "auto"}, "tool_choice goes with tools"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"function": {}}]}]},
            "tool_calls",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "c",
                                "type": "function",
                                "function": {"name": "f", "arguments": "{"},
                            }
                        ],
                    }
                ]
            },
            "arguments",
        ),
    ],
)
def test_what_is_wrong_with_tools_is_named(scripted, fields, named):
    with pytest.raises(openai.BadRequestError, match=named):
        ask(scripted, **fields)


def test_a_model_without_tools_in_its_template_refuses_them(http):
    with pytest.raises(openai.BadRequestError, match="takes no tools") as caught:
        http.client.chat.completions.create(**{**ASK, "model": "base", "tools": TOOLS})
    assert caught.value.status_code == 400


def test_markers_that_are_special_tokens_are_seen(tmp_path):
    """They have no text in an answer of their own."""
    template = "{{ tools }}[TOOL_CALLS]{{ messages[0].content }}"
    world, engines = World(tmp_path), ScriptedEngines(special="[TOOL_CALLS]")
    world.bundles["m"] = write_bundle(tmp_path / "b" / "m", "m", 1024, template, "[TOOL_CALLS]")
    with running_stack(tmp_path, engines, openai=OpenAiOptions(LOOPBACK)) as (stack, _):
        stack.host.switch(world.assignment(bundle="m"))
        engines.says('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "x"}}]')
        url = f"http://{stack.openai_address.target()}/v1"
        with openai.OpenAI(base_url=url, api_key="x") as client:
            message = client.chat.completions.create(**{**ASK, "model": "m"}, tools=TOOLS).choices[
                0
            ]
            plain = client.chat.completions.create(**{**ASK, "model": "m"}).choices[0]
    assert message.message.tool_calls[0].function.arguments == '{"city": "x"}'
    assert len(message.message.tool_calls[0].id) == 9  # all that Mistral's templates take
    assert "TOOL_CALLS" not in plain.message.content


def test_our_own_client_hears_the_same_calls(scripted):
    scripted.says(TWO)
    with Client(scripted.grpc) as client:
        options = {"messages": ASK["messages"], "tools": TOOLS, "max_tokens": 300}
        whole = client.generate(**options)
        stream = client.stream(**options)
        text = "".join(delta.text for delta in stream)
    for result in (whole, stream.result):
        assert result.text == text == "One moment."
        assert [(c.name, c.arguments_json) for c in result.tool_calls] == [
            ("weather", '{"city": "Köln"}'),
            ("forecast", "{}"),
        ]
    assert len(whole.token_ids) == len(TWO.encode()) + 1  # every token, the last one included


def test_our_own_client_hands_calls_and_answers_back(scripted):
    function = {"name": "weather", "arguments": '{"city": "x"}'}
    called = {"id": "c", "type": "function", "function": function}
    messages = [
        *ASK["messages"],
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c", "content": "sunny"},
    ]
    with Client(scripted.grpc) as client:
        rendered = client.tokenize(messages).rendered
        with pytest.raises(RequestInvalid, match="robots"):
            client.generate(messages=[{"role": "user", "content": "x", "robots": 1}])
        with pytest.raises(RequestInvalid, match="tools goes with chat"):
            client.generate("x", tools=TOOLS)
        with pytest.raises(RequestInvalid, match="tools_json"):
            client.generate(messages=ASK["messages"], tools=["x"])
    assert rendered.endswith('"arguments": {"city": "x"}}</tool_call>\nt:sunny(c)\na:')
