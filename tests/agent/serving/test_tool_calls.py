"""From a request's tools to the calls in its answer, for models that do not write JSON."""

from __future__ import annotations

import json

import pytest

from remora_agent.runtime.api import (
    ConstraintKind,
    Delta,
    Finished,
    FinishReason,
    Provenance,
    Timings,
    Usage,
)
from remora_agent.serving.call import ChatPrompt
from remora_agent.serving.tool_calls import CallReading, tool_plan
from remora_agent.text.tools import FORMATS

PARAMETERS = {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
ANSWERS = {
    "qwen3-coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\n75001\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>"
    ),
    "pythonic": "[weather(city='75001', days=3)]",
}
FORCED = '[{"name": "weather", "arguments": {"city": "75001", "days": 3}}]'

END = Finished(
    FinishReason.STOP, Usage(1, 0, 1), Timings(0.0, 0.0, 0.0, 0.0), Provenance("bundle", "engine")
)


def heard(plan, text: str):
    reading = CallReading(plan, lambda: "0" * 32, eager=True)
    events = [e for c in text for e in reading.events(Delta(c, (1,)))]
    *rest, end = reading.events(END)
    content = "".join(e.text for e in [*events, *rest] if isinstance(e, Delta))
    return content, [(c.name, json.loads(c.arguments_json)) for c in end.tool_calls]


@pytest.mark.parametrize("form", ANSWERS)
@pytest.mark.parametrize("choice", ["auto", "required", "weather"])
def test_an_answer_becomes_calls_with_arguments_of_the_functions_types(form, choice):
    plan = tool_plan(ChatPrompt(messages=(), tools=(TOOL,), tool_choice=choice), FORMATS[form])
    assert plan is not None
    text = ANSWERS[form] if choice == "auto" else FORCED
    assert heard(plan, text) == ("", [("weather", {"city": "75001", "days": 3})])
    if choice != "auto":  # a schema holds a list of JSON, not what the model writes by itself
        assert plan.constraint is not None and plan.constraint.kind is ConstraintKind.JSON_SCHEMA
