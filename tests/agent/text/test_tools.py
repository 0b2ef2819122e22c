"""Which text is a call of a tool, whatever pieces it arrives in."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.text.tool_reader import CallArguments, CallBegins, Content, ToolReader
from remora_agent.text.tools import FORMATS, check_tool_calls, check_tools, detect, template_calls
from remora_contract.errors import RequestInvalid

NAMES = ("f", "get_weather")
SCHEMAS = {"get_weather": {"properties": {"days": {"type": "array"}}}}
WEATHER = '{"city": "Köln \\"am\\" Rhein {[", "days": [1, {"x": null}]}'


def read(form: str, *pieces: str, **options):
    """Content, and (name, arguments) of each call."""
    ids = map(str, itertools.count())
    options.setdefault("schemas", SCHEMAS)
    reader = ToolReader(FORMATS[form], NAMES, lambda: next(ids), **options)
    found = [p for piece in pieces for p in reader.push(piece)] + reader.finish()
    content = "".join(p.text for p in found if isinstance(p, Content))
    begun = [p for p in found if isinstance(p, CallBegins)]
    assert [p.index for p in begun] == list(range(len(begun))) == list(range(reader.calls))
    arguments = ["" for _ in begun]
    for piece in found:
        if isinstance(piece, CallArguments):
            arguments[piece.index] += piece.text
    return content, [(p.name, a) for p, a in zip(begun, arguments, strict=True)]


def call(name: str = "get_weather", arguments: str = WEATHER, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


FIRST, SECOND = call(), call("f", "{}")
ANSWERS = {
    "hermes": f"Let me look.\n<tool_call>\n{FIRST}\n</tool_call>\n<tool_call>{SECOND}</tool_call>",
    "llama": f"{call(key='parameters')}; {call('f', '{}', 'parameters')}",
    "mistral": f"Let me look.\n[TOOL_CALLS] [{FIRST}, {SECOND}]",
    "mistral-args": (
        f"Let me look.[TOOL_CALLS]get_weather[ARGS]{WEATHER}"
        "[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{}"
    ),
    "granite": f"<|tool_call|>[{FIRST}, {SECOND}]",
    "phi": f"functools[{FIRST}, {SECOND}]",
    "qwen3-coder": (
        "Let me look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\n"
        'Köln "am" Rhein {[\n</parameter>\n<parameter=days>\n[1, {"x": null}]\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call><function=f></function></tool_call>"
    ),
    "pythonic": """[get_weather(city='Köln "am" Rhein {[', days=[1, {"x": None,},]), f( )]""",
}


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("form", ANSWERS)
def test_two_calls_of_every_family_are_found_and_leave_no_markup(form, eager):
    content, calls = read(form, ANSWERS[form], eager=eager)
    assert calls == [("get_weather", WEATHER), ("f", "{}")]
    assert content == ("Let me look." if "Let" in ANSWERS[form] else "")


@pytest.mark.parametrize("form", ANSWERS)
@given(data=st.data())
def test_the_pieces_in_which_a_text_arrives_change_nothing(form, data):
    noise = st.sampled_from(
        [
            "",
            " ",
            "Hi <tool",
            "[TOOL",
            "{",
            "[f(",
            "<tool_call><function=f>",
            "functools",
            "\n\n",
            "<tool_call>",
            "é",
        ]
    )
    text = data.draw(noise) + ANSWERS[form] + data.draw(noise)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    for eager in (False, True):
        assert read(form, *pieces, eager=eager) == read(form, text, eager=eager)


@pytest.mark.parametrize("form", FORMATS)
@given(text=st.text(alphabet='<>{}[]"tolcaTOLCA_|/ :,;x\\'))
def test_a_text_without_calls_is_content_to_its_last_character(form, text):
    assert read(form, text) == (text, [])
    assert read(form, *text) == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>not JSON</tool_call>",
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>',
        '<tool_call>{"name": "f", "arguments": 3}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"a": 1',
        "<tool_call>" + "[" * 5000,
        '<tool_call>{"name": "f", "arguments": ' + '{"a":' * 5000 + "1" + "}" * 5001,
    ],
)
def test_what_is_no_valid_call_stays_content_as_it_was_written(text):
    assert read("hermes", "before " + text) == ("before " + text, [])
    assert read("hermes", *("before " + text)) == ("before " + text, [])


def test_after_a_broken_call_a_good_one_is_still_found():
    text = f"<tool_call>oops</tool_call> <tool_call>{call()}</tool_call>"
    assert read("hermes", text) == ("<tool_call>oops</tool_call>", [("get_weather", WEATHER)])


def test_keys_in_another_order_and_parameters_for_arguments_are_a_call_too():
    text = '<tool_call>{"parameters": {"a": 1}, "name": "f"}</tool_call>'
    assert read("hermes", text, eager=True) == ("", [("f", '{"a": 1}')])


def test_an_eager_reader_tells_the_name_first_and_arguments_as_they_come():
    reader = ToolReader(FORMATS["hermes"], NAMES, lambda: "id", eager=True)
    assert reader.push('<tool_call>{"name": "f", "argu') == []
    assert reader.push('ments": {"a') == [CallBegins(0, "id", "f"), CallArguments(0, '{"a')]
    assert reader.push('": "}') == [CallArguments(0, '": "}')]
    assert reader.push('"}} ') == [CallArguments(0, '"}')]
    assert reader.push("</tool_call>") == reader.finish() == []


def test_a_cut_off_call_leaves_what_was_told_of_it():
    assert read("hermes", '<tool_call>{"name": "f", "arguments": {"a', eager=True) == (
        "",
        [("f", '{"a')],
    )


def test_one_call_may_stand_without_its_list():
    text = f"Look: <|tool_call|>{FIRST}<|/tool_call|>"
    for eager in (False, True):
        assert read("phi", text, eager=eager) == ("Look:", [("get_weather", WEATHER)])
        assert read("phi", *text, eager=eager) == ("Look:", [("get_weather", WEATHER)])


def test_what_follows_the_arguments_within_a_call_is_passed_over():
    """Mistral's templates repeat the id there."""
    text = '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]}"}, "id": "a1b2c3d4e"}]'
    for eager in (False, True):
        assert read("mistral", *text, eager=eager) == ("", [("f", '{"a": "]}"}')])


def test_a_forced_answer_needs_no_marker():
    assert read("mistral", f"[{call()}]", forced=True) == ("", [("get_weather", WEATHER)])
    assert read("llama", call(key="parameters"), forced=True)[1] == [("get_weather", WEATHER)]


def test_calls_beyond_the_allowed_ones_are_dropped():
    for eager in (False, True):
        content, calls = read("hermes", ANSWERS["hermes"], eager=eager, max_calls=1)
        assert (content, calls) == ("Let me look.", [("get_weather", WEATHER)])


def test_a_long_call_takes_time_in_proportion():
    long = json.dumps({"text": "x" * 50_000})
    text = f"<tool_call>{call('f', long)}</tool_call>"
    pieces = [text[i : i + 4] for i in range(0, len(text), 4)]
    assert read("hermes", *pieces)[1] == [("f", long)]


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}[TOOL_CALLS]x[ARGS]{% endif %}", "mistral-args"),
        ("{% if tools %}<|tool_call|>{% endif %}", "granite"),
        ("{{ message.tools }}<|tool|>", "phi"),
        ("{% if tools %}functools[{% endif %}", "phi"),
        ("{% if tools %}<|python_tag|>{% endif %}", "llama"),
        ('{{ tools }} {"name": n, "parameters": p} ipython', "llama"),
        ("{% if tools %}<tool_call><function=x><parameter=p>{% endif %}", "qwen3-coder"),
        ("{{ tools }} [func_name1(params_name1=params_value1, ...)] ipython", "pythonic"),
        ("{% if tools %}<tool_call><function=x>{% endif %}", None),
        ("<tool_call> but the word is missing", None),
        ("{{ tools }}", None),
        ("", None),
    ],
)
def test_a_template_tells_the_format(template, name):
    found = detect(template)
    assert (found.name if found else None) == name


def tool(**function):
    return {"type": "function", "function": {"name": "f", **function}}


@pytest.mark.parametrize(
    ("tools", "named"),
    [
        ([{"type": "custom"}], r"tools\[0\] must be"),
        ([tool(name="a b")], r"tools\[0\]\.function\.name"),
        ([tool(name=3)], r"tools\[0\]\.function\.name"),
        ([tool(), tool()], "listed twice"),
        ([tool(parameters=[1])], "parameters"),
        ([tool(description=1)], "description"),
        ([tool(extra=1)], "extra is unknown"),
        ([{**tool(), "extra": 1}], "extra is unknown"),
        ([tool(name=f"f{i}") for i in range(129)], "at most 128"),
    ],
)
def test_a_tool_that_is_none_is_refused_by_name(tools, named):
    with pytest.raises(RequestInvalid, match=named):
        check_tools(tools)


def test_calls_in_messages_reach_templates_with_their_arguments_as_a_table():
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"b": 1}'}}]
    check_tool_calls(calls, "x")
    assert template_calls(calls)[0]["function"]["arguments"] == {"b": 1}
    for wrong in ("[1]", "{", 3, '{"a": NaN}', '{"a": "\\ud800"}', '{"\\udc00": 1}'):
        with pytest.raises(RequestInvalid, match=r"x\[0\]\.function\.arguments"):
            check_tool_calls([{"function": {"name": "f", "arguments": wrong}}], "x")
