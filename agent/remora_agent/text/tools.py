"""How families of models write calls of tools, as data, and which family a chat template is of.

Pure. Reading an answer is `tool_reader`'s affair; what a call does is the caller's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from remora_agent.text.tool_bodies import from_json
from remora_contract.errors import RequestInvalid

MAX_TOOLS = 128
_NAME = r"[A-Za-z0-9_.-]{1,64}"
_TOOL_NAME = re.compile(_NAME)
# `{"name": "f", "arguments": ` in the order in which every family is trained to write it.
_JSON_HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"(?P<name>' + _NAME + r')"\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_ARGS_HEADER = re.compile(
    r"(?P<name>" + _NAME + r")(?:\[CALL_ID\][A-Za-z0-9]{1,64})?\[ARGS\]\s*(?=\{)"
)


@dataclass(frozen=True)
class ToolFormat:
    """`starts` begin calls, and no content; a call is what `header` begins.

    hermes    <tool_call>{"name": "f", "arguments": {}}</tool_call>, once for each call
    llama     {"name": "f", "parameters": {}} as the whole answer, or after <|python_tag|>
    mistral   [TOOL_CALLS][{"name": "f", "arguments": {}}, ...]
    mistral-args  [TOOL_CALLS]f[ARGS]{}, once for each call
    granite   <|tool_call|>[{"name": "f", "arguments": {}}, ...]
    phi       functools[{"name": "f", "arguments": {}}, ...], or a call in <|tool_call|>
    qwen3-coder  <tool_call><function=f><parameter=key>value</parameter></function></tool_call>
    pythonic  [f(a=1), g()] as the whole answer, or after <|python_start|>

    Where a list is written, one call alone may stand without it.
    """

    name: str
    starts: tuple[str, ...]
    end: str = ""  # written after a call, or after the list of calls
    listed: bool = False  # calls stand in one JSON list
    bare: bool = False  # an answer that begins with `opening` is a call too
    opening: Literal["{", "<", "["] = "{"  # of a call: of JSON, of an element, of Python's calls
    separator: str = ""  # between calls that are not listed
    header: re.Pattern[str] = _JSON_HEADER
    words: tuple[str, ...] = ()  # further markers inside of a call
    argument_key: str = "arguments"
    system_tools: bool = False  # the template looks for tools in the system message

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be special tokens and have to stay visible in an answer."""
        return tuple(m for m in (*self.starts, self.end, *self.words) if m)


FORMATS = {
    f.name: f
    for f in (
        ToolFormat("hermes", ("<tool_call>",), "</tool_call>"),
        ToolFormat(
            "llama",
            ("<|python_tag|>",),
            bare=True,
            separator=";",
            argument_key="parameters",
        ),
        ToolFormat("mistral", ("[TOOL_CALLS]",), listed=True),
        ToolFormat(
            "mistral-args", ("[TOOL_CALLS]",), header=_ARGS_HEADER, words=("[CALL_ID]", "[ARGS]")
        ),
        ToolFormat("granite", ("<|tool_call|>", "<tool_call>"), listed=True),
        ToolFormat(
            "phi",
            ("functools", "<|tool_call|>"),
            "<|/tool_call|>",
            listed=True,
            system_tools=True,
        ),
        ToolFormat("qwen3-coder", ("<tool_call>",), "</tool_call>", opening="<"),
        ToolFormat("pythonic", ("<|python_start|>",), "<|python_end|>", bare=True, opening="["),
    )
}
# Looked for in a template's text, the first that all stand in it wins. None: a way of writing
# calls that is not read here.
_SIGNS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("[TOOL_CALLS]", "[ARGS]"), "mistral-args"),
    (("[TOOL_CALLS]",), "mistral"),
    (("[func_name1(params_name1=params_value1",), "pythonic"),
    (("<tool_call>", "<function=", "<parameter="), "qwen3-coder"),
    (("<function=",), None),
    (("<arg_key>",), None),
    (("<|tool|>",), "phi"),
    (("functools[",), "phi"),
    (("<|tool_call|>",), "granite"),
    (("<tool_call>",), "hermes"),
    (("<|python_tag|>",), "llama"),
    (('"parameters"', "ipython"), "llama"),
)
_TAKES_TOOLS = re.compile(r"\btools\b")


def detect(template: str) -> ToolFormat | None:
    """The format of a model with this chat template; None when it takes no tools, or writes calls
    in a way that is not read here."""
    if not _TAKES_TOOLS.search(template):
        return None
    for signs, name in _SIGNS:
        if all(sign in template for sign in signs):
            return FORMATS[name] if name is not None else None
    return None


def check_tools(tools: Sequence[Mapping[str, Any]], where: str = "tools") -> tuple[str, ...]:
    """The functions' names. Raises RequestInvalid naming what is wrong with one."""
    if len(tools) > MAX_TOOLS:
        raise RequestInvalid(f"{where}: at most {MAX_TOOLS} tools, not {len(tools)}")
    names: list[str] = []
    for i, tool in enumerate(tools):
        names.append(_function_name(tool, f"{where}[{i}]"))
    for name in names:
        if names.count(name) > 1:
            raise RequestInvalid(f"{where}: function {name} is listed twice")
    return tuple(names)


def _function_name(tool: Mapping[str, Any], where: str) -> str:
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise RequestInvalid(f'{where} must be {{"type": "function", "function": {{...}}}}')
    if unknown := set(tool) - {"type", "function"}:
        raise RequestInvalid(f"{where}.{min(unknown)[:40]} is unknown; leave it out")
    if unknown := set(function) - {"name", "description", "parameters", "strict"}:
        raise RequestInvalid(f"{where}.function.{min(unknown)[:40]} is unknown; leave it out")
    name = function.get("name")
    if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
        raise RequestInvalid(
            f"{where}.function.name must have 1 to 64 letters, digits, '_', '.' or '-', "
            f"not {str(name)[:80]!r}"
        )
    if not isinstance(function.get("description") or "", str):
        raise RequestInvalid(f"{where}.function.description must be text")
    if not isinstance(function.get("parameters") or {}, Mapping):
        raise RequestInvalid(f"{where}.function.parameters must be a JSON schema")
    return name


def check_tool_calls(calls: Sequence[Mapping[str, Any]], where: str) -> None:
    """Calls as messages carry them: {"id", "type", "function": {"name", "arguments"}}, the
    arguments being a JSON object as text. Raises RequestInvalid."""
    for i, call in enumerate(calls):
        at, function = f"{where}[{i}]", call.get("function")
        if call.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise RequestInvalid(f'{at} must be {{"id", "type": "function", "function": {{...}}}}')
        if unknown := set(call) - {"id", "type", "function", "index"}:
            raise RequestInvalid(f"{at}.{min(unknown)[:40]} is unknown; leave it out")
        if not isinstance(call.get("id", ""), str):
            raise RequestInvalid(f"{at}.id must be text")
        if not isinstance(function.get("name"), str):
            raise RequestInvalid(f"{at}.function.name must be text")
        _arguments(function, at)


def template_calls(calls: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Checked calls as templates take them: their arguments as a table, not as text."""
    return [
        {
            "id": call.get("id", ""),
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": _arguments(call["function"], "tool_calls"),
            },
        }
        for call in calls
    ]


def _arguments(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = function.get("arguments", "{}")
    try:
        arguments = from_json(text) if text != "" else {}
        json.dumps(arguments, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (TypeError, ValueError, RecursionError) as e:
        raise RequestInvalid(f"{where}.function.arguments is not valid JSON text: {e}") from e
    if not isinstance(arguments, dict):
        raise RequestInvalid(f"{where}.function.arguments must be a JSON object as text")
    return arguments
