"""Calls of tools that are not JSON: what they mean, and what is none."""

from __future__ import annotations

import json
import time

import pytest

from tests.agent.text.test_tools import read


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("f()", {}),
        ("f(a=1, b=-2.5e3,)", {"a": 1, "b": -2500.0}),
        ("f(a=True, b=false, c=None, d=null)", {"a": True, "b": False, "c": None, "d": None}),
        ("""f(a='it\\'s', b="\\u00e9\\n\\d")""", {"a": "it's", "b": "é\n\\d"}),
        ("f(a={'k': [1, 2, {}],}, b=[])", {"a": {"k": [1, 2, {}]}, "b": []}),
        ("f(a=')], f(')", {"a": ")], f("}),
    ],
)
def test_pythons_literals_become_json(text, arguments):
    for answer in (f"[{text}]", f" [ {text} ]", f"<|python_start|>[{text}]<|python_end|>"):
        for pieces in ([answer], list(answer)):
            content, [(name, found)] = read("pythonic", *pieces)
            assert (content, name, json.loads(found)) == ("", "f", arguments)


@pytest.mark.parametrize(
    "text",
    [
        "[1] says so",
        "[f] and more",
        "[unknown(a=1)]",
        "[f(a=1), unknown()]",
        "[f(1)]",
        "[f(a=b)]",
        "[f(a=__import__('os').system('x'))]",
        "[f(a=1+1)]",
        "[f(a=f(b=1))]",
        "[f(a=1, a=2)]",
        "[f(a=(1, 2))]",
        "[f(a=1]",
        "[f(a={1: 2})]",
        "[f(a=01)]",
        "[f() f()]",
        "[f(a='",
        "[f(a=1)",
        "[f(a=" + "[" * 50_000 + "]" * 50_000 + ")]",
        "[f(a=" + "9" * 5000 + ")]",
        "It is [f(a=1)].",
        "[]",
    ],
)
def test_what_is_no_list_of_calls_stays_content(text):
    assert read("pythonic", text) == (text, [])
    assert read("pythonic", *text) == (text, [])


def element(*parameters: str, name: str = "f") -> str:
    body = "".join(f"<parameter={p}\n</parameter>\n" for p in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("schema", "value", "meant"),
    [
        ({"type": "string"}, "3", "3"),
        ({"type": "integer"}, "3", 3),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, "[1, null]", [1, None]),
        ({"type": "object"}, "{'no': 'JSON'}", "{'no': 'JSON'}"),
        ({"type": "number"}, "NaN", "NaN"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "3", "3"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"enum": ["1", "2"]}, "1", "1"),
        (None, "3", "3"),
        (
            {"type": "string"},
            "  two\n\nlines </parameter> <b>\n",
            "  two\n\nlines </parameter> <b>\n",
        ),
        ({"type": "string"}, "</function></tool_call>", "</function></tool_call>"),
    ],
)
def test_an_elements_value_is_what_the_schema_says(schema, value, meant):
    schemas = {"f": {"properties": {"a": schema} if schema else {}}}
    text = element(f"a>\n{value}")
    for pieces in ([text], list(text)):
        content, [(name, found)] = read("qwen3-coder", *pieces, schemas=schemas)
        assert (content, name, json.loads(found)) == ("", "f", {"a": meant})


@pytest.mark.parametrize(
    "text",
    [
        element("a>\n1", name="unknown"),
        element("a>\n1", "a>\n2"),
        element("a\nb>\n1"),
        element("a" * 65 + ">\n1"),
        element("a>\n1").replace("</function>", "</functions>"),
        element("a>\n1")[:60],
        "<tool_call>\n<function=f",
        "<tool_call>\n<functional>",
        "<tool_call>" + "<function=f>" * 500,
        "the tag <tool_call> is written so",
    ],
)
def test_what_is_no_element_of_a_call_stays_content(text):
    assert read("qwen3-coder", text) == (text, [])
    assert read("qwen3-coder", *text) == (text, [])


def test_a_broken_escape_never_leaves_text_that_utf8_cannot_carry():
    lone = chr(92) + "ud800"
    for form, text in (
        ("pythonic", f'[f(a="{lone}")]'),
        ("hermes", f'<tool_call>{{"parameters": {{"a": "{lone}"}}, "name": "f"}}</tool_call>'),
    ):
        _, [(_, arguments)] = read(form, text)
        assert arguments.encode() and json.loads(arguments) == {"a": chr(0xD800)}


def test_what_json_does_not_know_is_no_call():
    text = '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'
    assert read("hermes", text) == (text, [])


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("pythonic", "[f(a='" + "x" * 100_000 + "')]"),
        ("qwen3-coder", element("a>\n" + "</parameter" * 10_000)),
    ],
)
def test_a_long_call_takes_time_in_proportion(form, text):
    begun = time.process_time()
    assert len(read(form, *(text[i : i + 4] for i in range(0, len(text), 4)))[1]) == 1
    assert time.process_time() - begun < 10
