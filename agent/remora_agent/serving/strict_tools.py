"""A free answer whose calls of strict tools are held to their schemas: one grammar for both.

Text goes on as it likes. What begins a call in the model's own way of writing, its marker and a
bracket, is followed by calls of declared tools and nothing else: those of strict tools match their
schema, those of the others have any object for arguments. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remora_agent.runtime.api import Constraint, ConstraintKind
from remora_agent.runtime.grammar import JSON_WHITESPACE
from remora_agent.text.tools import ToolFormat
from remora_contract.errors import Unsupported

# What an answer's reader passes over between a marker and its call.
_SPACES = "".join(f"\\u{{{c:x}}}" for c in range(0x110000) if chr(c).isspace())
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_WHY_NOT = {
    "llama": "an answer that begins with a brace may be a call or an answer in JSON",
    "qwen3-coder": "calls are elements, whose values no JSON schema holds",
    "pythonic": "calls are written as Python's, which no JSON schema holds",
}


@dataclass(frozen=True)
class SpecialTokens:
    """Of the model's tokenizer: those that are markers, by their text, and all others."""

    markers: Mapping[str, int]
    others: Sequence[int] = ()


def is_strict(function: Mapping[str, Any]) -> bool:
    return bool(function.get("strict"))


def holding(
    form: ToolFormat, functions: Sequence[Mapping[str, Any]], special: SpecialTokens
) -> Constraint:
    """Raises Unsupported for a way of writing calls that no grammar holds exactly."""
    if form.name in _WHY_NOT:
        named = next(f["name"] for f in functions if is_strict(f))
        raise Unsupported(
            f"tools: strict of {named} with a free choice of tools: in this model's way of writing "
            f"calls ({form.name}) {_WHY_NOT[form.name]}; leave strict out, or say tool_choice "
            "required or name the function"
        )
    writer = _Writer(form, special)
    rules = [
        "%llguidance {}",
        f"start: (held{' | other' if special.others else ''})* TEXT",
        *(writer.named(functions) if form.words else writer.objects(functions)),
        *([f"other: TEXT {_ids(special.others)}"] if special.others else []),
        r"TEXT: /(.|\n)*/",
        f"SPACE: /[{_SPACES}]*/",
        r"FEW: /[ \t\r\n]{0,8}/",  # of blanks alone an answer must not consist
        f"BLANK: /{JSON_WHITESPACE}/",
    ]
    return Constraint(ConstraintKind.LARK, "\n".join(rules) + "\n")


@dataclass(frozen=True)
class _Writer:
    form: ToolFormat
    special: SpecialTokens

    def objects(self, functions: Sequence[Mapping[str, Any]]) -> Iterable[str]:
        """Calls that are JSON, by themselves or in a list. A marker alone is text, also of plain
        answers: a call is what a bracket follows."""
        end = f"(FEW ({self._marker(self.form.end)}))" if self.form.end else ""
        yield from self._beginnings("object", "{")
        held = [f"object call {end}"]
        if self.form.listed:
            # Of an end after a list templates disagree: it may stay away.
            end = f"{end}?" if end else ""
            held = [f"object call {end}", f"list calls {end}"]
            yield from self._beginnings("list", "[")
            yield 'calls: BLANK "{" call (BLANK "," BLANK "{" call)* BLANK "]"'
        yield f"held: {' | '.join(held)}"
        yield f"call: {' | '.join(f'call_{i}' for i in range(len(functions)))}"
        for i, function in enumerate(functions):
            name, key = json.dumps(function["name"]), json.dumps(self.form.argument_key)
            parts = ('"name"', ":", name, ",", key, ":")
            written = " ".join(f"BLANK {json.dumps(part)}" for part in parts)
            yield f'call_{i}: {written} BLANK arguments_{i} BLANK "}}"'
            yield f"arguments_{i}: %json {_json(_parameters(function))}"

    def _beginnings(self, rule: str, bracket: str) -> Iterable[str]:
        """A beginning ends the text before it at once, whatever more could be text."""
        names = []
        for i, start in enumerate(self.form.starts):
            names.append(f"{rule}_{i}")
            yield f'{names[-1]}[lazy]: TEXT {json.dumps(start)} SPACE "{bracket}"'
            if start in self.special.markers:
                names.append(f"{rule}_token_{i}")
                token = _ids([self.special.markers[start]])
                yield f'{names[-1]}: TEXT {token} FEW "{bracket}"'
        yield f"{rule}: {' | '.join(names)}"

    def named(self, functions: Sequence[Mapping[str, Any]]) -> Iterable[str]:
        """name[CALL_ID]id[ARGS]{…}, behind the marker."""
        call_id, arguments = (f"({self._marker(word)})" for word in self.form.words)
        (start,) = self.form.starts
        yield f"text[lazy]: TEXT {json.dumps(start)}"
        token = self.special.markers.get(start)
        if token is not None:
            yield f"token: TEXT {_ids([token])}"
        tools = " | ".join(f"tool_{i}" for i in range(len(functions)))
        yield f"held: {'text' if token is None else '(text | token)'} FEW ({tools})"
        for i, function in enumerate(functions):
            name = json.dumps(function["name"])
            head = f"{name} ({call_id} /[A-Za-z0-9]{{1,64}}/)? {arguments} FEW"
            yield f"tool_{i}: {head} arguments_{i}"
            yield f"arguments_{i}: %json {_json(_parameters(function))}"

    def _marker(self, text: str) -> str:
        """As its characters, or as the special token that it is."""
        token = self.special.markers.get(text)
        return json.dumps(text) if token is None else f"{json.dumps(text)} | {_ids([token])}"


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """A document of its own, so that `#/$defs/X` in it means its own."""
    declared = (function.get("parameters") or {}) if is_strict(function) else _ANY_OBJECT
    return {"type": "object", "$id": f"urn:remora:tool:{function['name']}", **declared}


def _json(schema: Mapping[str, Any]) -> str:
    return json.dumps({**schema, "x-guidance": {"whitespace_pattern": JSON_WHITESPACE}})


def _ids(tokens: Sequence[int]) -> str:
    return f"<[{','.join(map(str, tokens))}]>"
