"""Calls that are not written as JSON: Python's calls in a list, and Qwen3-Coder's elements.

Pure. Nothing is evaluated: values are read by a reader of literals, and a call is one only when
all of it can be read. Readers go on where they stopped when more text has arrived.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

_MAX_ARGUMENTS = 256  # of one element
_MAX_CALLS = 64  # in one list
_NAME = r"[A-Za-z_][A-Za-z0-9_.-]{0,63}"


@dataclass(frozen=True)
class Found:
    """Where what was read ends, and (name, arguments as JSON text) of each call."""

    end: int
    calls: tuple[tuple[str, str], ...]


NO_CALL = Found(0, ())


class BodyReader(Protocol):
    def read(self, text: str, start: int) -> Found | None:
        """None: it takes more text to tell. `text` may only have grown since the last time."""
        ...


def to_json(value: object) -> str:
    """Readable, and always text that UTF-8 can carry."""
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_utf8(text) else json.dumps(value)


def from_json(text: str) -> Any:
    """Strictly: NaN and Infinity are no JSON. Raises ValueError, RecursionError."""
    return json.loads(text, parse_constant=_no_constant)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Python's calls ------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\s*(?:
      (?P<text>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<number>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?(?![\w.]))
    | (?P<word>"""
    + _NAME
    + r""")
    | (?P<mark>[\[\]{}(),:=])
    )\s*""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": ""}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false"}
_WORDS["null"] = "null"
_BEGIN = re.compile(r"\[\s*(?:(?P<name>" + _NAME + r")\s*(?P<open>\(|$))?")


class PythonCalls:
    """`[f(a=1), g()]`: all of the list or nothing."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._depth, self._quote, self._escaped = 0, "", False
        self._seen = 0

    def read(self, text: str, start: int) -> Found | None:
        begin = _BEGIN.match(text, start)
        if begin is None or (begin["name"] is None and begin.end() < len(text)):
            return NO_CALL
        if begin["open"] and begin["name"] not in self._names:
            return NO_CALL
        end = self._end(text, start) if begin["open"] else None
        if end is None:
            return None
        try:
            calls = _python_calls(text[start:end])
        except (ValueError, RecursionError):
            return NO_CALL
        known = calls and all(name in self._names for name, _ in calls)
        return Found(end, tuple(calls)) if known else NO_CALL

    def _end(self, text: str, start: int) -> int | None:
        for place in range(max(start, self._seen), len(text)):
            character = text[place]
            if self._quote:
                if not self._escaped and character == self._quote:
                    self._quote = ""
                self._escaped = not self._escaped and character == "\\"
            elif character in "\"'":
                self._quote = character
            elif character in "[({":
                self._depth += 1
            elif character in "])}":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        self._seen = len(text)
        return None


def _python_calls(text: str) -> list[tuple[str, str]]:
    """Raises ValueError for what is no list of calls with named literals."""
    tokens, place = _tokens(text), 1
    calls: list[tuple[str, str]] = []
    if tokens[0] != ("mark", "["):
        raise ValueError("no list")
    while tokens[place] != ("mark", "]"):
        kind, name = tokens[place]
        if kind != "word" or tokens[place + 1] != ("mark", "(") or len(calls) == _MAX_CALLS:
            raise ValueError("no call")
        arguments, place = _python_arguments(tokens, place + 2)
        calls.append((name, arguments))
        if tokens[place] == ("mark", ","):
            place += 1
        elif tokens[place] != ("mark", "]"):
            raise ValueError("no list of calls")
    if place + 2 != len(tokens):
        raise ValueError("more than a list")
    return calls


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    place = 0
    while place < len(text):
        found = _TOKEN.match(text, place)
        if found is None or found.lastgroup is None:
            raise ValueError("no literal")
        tokens.append((found.lastgroup, found[found.lastgroup]))
        place = found.end()
    return [*tokens, ("end", "")]


def _python_arguments(tokens: list[tuple[str, str]], place: int) -> tuple[str, int]:
    """The arguments as JSON text, and the place after the closing parenthesis."""
    arguments: dict[str, Any] = {}
    while tokens[place] != ("mark", ")"):
        kind, key = tokens[place]
        if kind != "word" or tokens[place + 1] != ("mark", "=") or key in arguments:
            raise ValueError("no named argument")
        value, place = _literal(tokens, place + 2)
        arguments[key] = from_json(value)
        if tokens[place] == ("mark", ","):
            place += 1
        elif tokens[place] != ("mark", ")"):
            raise ValueError("no arguments")
    return to_json(arguments), place + 1


def _literal(tokens: list[tuple[str, str]], place: int) -> tuple[str, int]:
    """One value as JSON text, grammar unchecked, and the place after it."""
    parts: list[str] = []
    depth = 0
    while True:
        kind, token = tokens[place]
        place += 1
        if kind == "mark" and token in "[{":
            depth += 1
        elif kind == "mark" and token in "]}":
            depth -= 1
            if parts[-1:] == [","]:
                parts.pop()  # Python allows a comma after the last one
        parts.append(_as_json(kind, token))
        if depth <= 0:
            return "".join(parts), place


def _as_json(kind: str, token: str) -> str:
    if kind == "text":
        return json.dumps(_ESCAPE.sub(_unescaped, token[1:-1]))
    if kind == "word" and token in _WORDS:
        return _WORDS[token]
    if kind == "number" or (kind == "mark" and token in "[]{},:"):
        return token
    raise ValueError(f"{token!r} is no literal")


def _unescaped(found: re.Match[str]) -> str:
    if code := found[1] or found[2]:
        return chr(int(code, 16))
    character = found[3]
    return _ESCAPES.get(character, character if character in "\\'\"" else "\\" + character)


# Qwen3-Coder's elements ----------------------------------------------------------------------

_FUNCTION = "<function="
_FUNCTION_END = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_END = "</parameter>"
_OPEN = re.compile(r"<(?:function|parameter)=([^<>\n]{1,64})>")
_MAX_OPEN = len(_PARAMETER) + 65


class ElementCall:
    """`<function=f><parameter=key>value</parameter></function>`, `schemas` being the parameters
    of each function: they tell a text from a number. A value may hold anything but its own end
    followed by what comes after a value."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self._schemas = schemas
        self._name = self._key = ""
        self._begin = self._place = 0  # of the value; of what was not looked at yet
        self._values: dict[str, Any] = {}

    def read(self, text: str, start: int) -> Found | None:
        self._place = max(self._place, start)
        while True:
            found = self._in_value(text) if self._key else self._between(text)
            if found is not True:
                return found

    def _between(self, text: str) -> Found | Literal[True] | None:
        """True: go on."""
        place = self._place
        while place < len(text) and text[place].isspace():
            place += 1
        expected = (_PARAMETER, _FUNCTION_END) if self._name else (_FUNCTION,)
        rest = text[place : place + _MAX_OPEN]
        if any(e.startswith(rest) and e != rest for e in expected):
            return None
        if self._name and rest.startswith(_FUNCTION_END):
            return Found(place + len(_FUNCTION_END), ((self._name, to_json(self._values)),))
        return self._open(text, place) if rest.startswith(expected[0]) else NO_CALL

    def _open(self, text: str, place: int) -> Found | Literal[True] | None:
        opened = _OPEN.match(text, place)
        if opened is None:
            rest = text[place : place + _MAX_OPEN]
            broken = len(rest) == _MAX_OPEN or any(c in rest[1:] for c in "<>\n")
            return NO_CALL if broken else None
        self._place = self._begin = opened.end()
        if not self._name:
            self._name = opened[1]
            return True if self._name in self._schemas else NO_CALL
        self._key = opened[1]
        repeated = self._key in self._values or len(self._values) == _MAX_ARGUMENTS
        return NO_CALL if repeated else True

    def _in_value(self, text: str) -> Found | Literal[True] | None:
        end = text.find(_PARAMETER_END, self._place)
        if end < 0:
            self._place = max(self._begin, len(text) - len(_PARAMETER_END))
            return None
        after = end + len(_PARAMETER_END)
        place = after
        while place < len(text) and text[place].isspace():
            place += 1
        rest = text[place : place + len(_FUNCTION_END)]
        if rest.startswith((_PARAMETER, _FUNCTION_END)):
            schema = self._schemas[self._name]
            value = text[self._begin : end].removeprefix("\n").removesuffix("\n")
            self._values[self._key] = _value(value, _schema_of(schema, self._key))
            self._key, self._place = "", after
            return True
        if any(e.startswith(rest) for e in (_PARAMETER, _FUNCTION_END)):
            self._place = end
            return None
        self._place = after
        return True


def _schema_of(parameters: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    properties = parameters.get("properties")
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return schema if isinstance(schema, Mapping) else {"type": "string"}


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """A text where the schema has one; else what it says as JSON, if it is JSON."""
    types = _types(schema)
    nothing = text.strip() in ("null", "None") and "null" in types
    if "string" in types and not nothing:
        return text
    stripped = text.strip()
    try:
        return from_json(_WORDS.get(stripped, stripped))
    except (ValueError, RecursionError):
        return text


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a schema names itself, in a union, or by its values being texts."""
    types: set[str] = set()
    for one in (schema, *(s for k in ("anyOf", "oneOf") for s in _list(schema.get(k)))):
        named = one.get("type") if isinstance(one, Mapping) else None
        types |= {t for t in (named if isinstance(named, list) else [named]) if isinstance(t, str)}
    values = [*_list(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]
    if not types and any(isinstance(v, str) for v in values):
        types.add("string")
    return types


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
