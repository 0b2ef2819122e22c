"""Tools in a chat: what a call asks for becomes a plan, and the answer's events show its calls.

Pure. Knows no wire format; `text.tools` knows how families
of models write calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from remora_agent.runtime.api import Constraint, ConstraintKind, Delta, Finished, ToolCall
from remora_agent.runtime.grammar import JSON_WHITESPACE
from remora_agent.serving.call import ChatPrompt, GenerateCall
from remora_agent.serving.event_stream import StreamEvent
from remora_agent.serving.strict_tools import SpecialTokens, holding, is_strict
from remora_agent.text.tool_reader import CallArguments, CallBegins, Content, Piece, ToolReader
from remora_agent.text.tools import FORMATS, ToolFormat
from remora_contract.errors import RequestInvalid, Unsupported

_NONE_SPECIAL = SpecialTokens({})
AUTO, NONE, REQUIRED = "auto", "none", "required"
ToolEvent = StreamEvent | CallBegins | CallArguments


@dataclass(frozen=True)
class ToolPlan:
    """How the tools of one call are offered to the model and read from its answer."""

    form: ToolFormat
    names: tuple[str, ...]  # of the functions it may call
    constraint: Constraint | None = None  # makes it call one
    forced: bool = False  # it must call, and writes no start marker
    max_calls: int | None = None
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # of the parameters
    held: bool = False  # it may call: the constraint is of strict tools


def offers_tools(prompt: ChatPrompt) -> bool:
    return bool(prompt.tools) and prompt.tool_choice != NONE


def tool_plan(
    prompt: object, form: ToolFormat | None, special: SpecialTokens = _NONE_SPECIAL
) -> ToolPlan | None:
    """None for a call without tools. Raises Unsupported where the model's chat template takes
    none, RequestInvalid for a choice that names no tool."""
    if not isinstance(prompt, ChatPrompt) or not offers_tools(prompt):
        return None
    if form is None:
        raise Unsupported(
            "tools: the bundle's chat template takes no tools, or its way of writing calls is "
            "unknown; leave them out, or name the format (serving.tool_format)"
        )
    names = tuple(str(tool["function"]["name"]) for tool in prompt.tools)
    most = None if prompt.parallel_tool_calls else 1
    if prompt.tool_choice in ("", AUTO):
        functions = [tool["function"] for tool in prompt.tools]
        schemas = {str(f["name"]): f.get("parameters") or {} for f in functions}
        free = ToolPlan(form, names, max_calls=most, schemas=schemas)
        if not any(map(is_strict, functions)):
            return free
        return replace(free, constraint=holding(form, functions, special), held=True)
    allowed = names if prompt.tool_choice == REQUIRED else (prompt.tool_choice,)
    if not set(allowed) <= set(names):
        raise RequestInvalid(f"tool_choice: no tool is named {prompt.tool_choice[:80]!r}")
    if prompt.tool_choice != REQUIRED:
        most = 1
    if form.words or form.opening != "{":
        form = FORMATS["mistral"]  # a list of JSON, which a schema can hold
    tools = [tool["function"] for tool in prompt.tools if tool["function"]["name"] in allowed]
    forced = form.listed or form.bare
    return ToolPlan(form, allowed, calling(form, tools, most), forced, most)


def calling(
    form: ToolFormat, functions: list[Mapping[str, Any]], max_calls: int | None
) -> Constraint:
    """An answer that is one or more valid calls of these functions and nothing else."""
    one = {"anyOf": [_call_schema(f, form.argument_key) for f in functions]}
    if form.listed:
        listed: dict[str, Any] = {"type": "array", "items": one, "minItems": 1}
        if max_calls is not None:
            listed["maxItems"] = max_calls
        return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(listed))
    if form.bare:
        return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(one))
    start, end = json.dumps(form.starts[0] + "\n"), json.dumps("\n" + form.end)
    more = "" if max_calls == 1 else ' ("\\n" call)*'
    # Within Lark llguidance's own blanks hold, without end: a model could write nothing else.
    body = json.dumps(one | {"x-guidance": {"whitespace_pattern": JSON_WHITESPACE}})
    grammar = f"start: call{more}\ncall: {start} body {end}\nbody: %json {body}\n"
    return Constraint(ConstraintKind.LARK, grammar)


def _call_schema(function: Mapping[str, Any], argument_key: str) -> dict[str, Any]:
    """The parameters stay a document of their own, so that `#/$defs/X` in them means theirs."""
    own = {"$id": f"urn:remora:tool:{function['name']}"}
    return {
        "type": "object",
        "properties": {
            "name": {"const": function["name"]},
            argument_key: {"type": "object", **own, **(function.get("parameters") or {})},
        },
        "required": ["name", argument_key],
        "additionalProperties": False,
    }


def constrained(call: GenerateCall, plan: ToolPlan | None) -> GenerateCall:
    """`call` with the plan's constraint. Raises RequestInvalid when it has another one: nothing
    can be both."""
    if plan is None:
        return call
    if call.constraint is not None:
        raise RequestInvalid(
            "tools: an answer cannot be held to a form (response_format, a constraint) and call "
            "tools; leave one of them out, or say tool_choice none"
        )
    if plan.constraint is not None and call.stopping.ignore_eos:
        what = "whose calls are held to schemas" if plan.held else "that must call a tool"
        raise RequestInvalid(f"ignore_eos: an answer {what} ends where its grammar does")
    return replace(call, constraint=plan.constraint)


class CallReading:
    """Of one answer: its events with the calls taken out of the text; Finished has them all.
    `eager` also yields each call as it is written; when the answer ends within one, by a stop
    string for one, Finished has none: half a call is none to act on, and a caller who is told all
    at once gets it as text. Without a plan events pass as they are."""

    def __init__(
        self, plan: ToolPlan | None, new_id: Callable[[], str], *, eager: bool = False
    ) -> None:
        self._eager = eager
        self._calls: list[ToolCall] = []
        self._reader = None if plan is None else _reader(plan, new_id, eager)

    def events(self, event: StreamEvent) -> list[ToolEvent]:
        if self._reader is None or not isinstance(event, Delta | Finished):
            return [event]
        if isinstance(event, Delta):
            return self._shown(self._reader.push(event.text), event)
        rest = self._shown(self._reader.finish(), Delta("", ()))
        calls = () if self._reader.unfinished else tuple(self._calls)
        return [*rest, replace(event, tool_calls=calls)]

    def _shown(self, pieces: list[Piece], delta: Delta) -> list[ToolEvent]:
        """The delta's tokens go with the first text."""
        out: list[ToolEvent] = []
        rest = replace(delta, text="")
        for piece in pieces:
            if isinstance(piece, Content):
                out.append(replace(rest, text=piece.text))
                rest = Delta("", ())
                continue
            self._keep(piece)
            if self._eager:
                out.append(piece)
        return [rest, *out] if rest.token_ids else out

    def _keep(self, piece: CallBegins | CallArguments) -> None:
        if isinstance(piece, CallBegins):
            self._calls.append(ToolCall(piece.id, piece.name, ""))
        else:
            last = self._calls[piece.index]
            whole = last.arguments_json + piece.text
            self._calls[piece.index] = replace(last, arguments_json=whole)


def _reader(plan: ToolPlan, new_id: Callable[[], str], eager: bool) -> ToolReader:
    return ToolReader(
        plan.form,
        plan.names,
        lambda: _call_id(plan.form, new_id),
        eager=eager,
        forced=plan.forced,
        max_calls=plan.max_calls,
        schemas=plan.schemas,
    )


def _call_id(form: ToolFormat, new_id: Callable[[], str]) -> str:
    """Mistral's templates take ids of nine characters only."""
    return new_id()[:9] if form.name.startswith("mistral") else f"call_{new_id()[:24]}"
