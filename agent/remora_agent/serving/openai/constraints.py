"""What an answer must be: response_format and vLLM's fields for it become a Constraint. Pure."""

from __future__ import annotations

import json
from typing import Any

from remora_agent.runtime.api import Constraint, ConstraintKind
from remora_agent.serving.openai.errors import FieldInvalid
from remora_agent.serving.openai.fields import Fields, Refusals, one_of

_GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")
_STRUCTURED_UNSUPPORTED: Refusals = {
    "disable_fallback": ((False,), "there is one backend, and no other to fall back on"),
    "disable_any_whitespace": ((False,), "say x-guidance.whitespace_pattern in the schema"),
    "disable_additional_properties": ((False,), "say additionalProperties in the schema"),
    "whitespace_pattern": ((), "say x-guidance.whitespace_pattern in the schema"),
    "structural_tag": ((), "say a grammar"),
}
_KINDS = {
    "json": ConstraintKind.JSON_SCHEMA,
    "regex": ConstraintKind.REGEX,
    "grammar": ConstraintKind.LARK,
}


def constraint(fields: Fields) -> Constraint | None:
    """Raises FieldInvalid when two ways of saying it are used at once."""
    # {"type": "text"} asks for nothing, and so stands beside any other.
    formatted = _response_format(fields) if fields.has("response_format") else None
    ways = ("structured_outputs", *_GUIDED)
    name = one_of(fields, ways if formatted is None else ("response_format", *ways))
    if name is None or name == "response_format":
        return formatted
    if name == "structured_outputs":
        inner = Fields(fields.table(name) or {}, fields.path(name))
        chosen = one_of(inner, _STRUCTURED)
        if chosen is None:
            raise FieldInvalid(
                f"{inner.path('')[:-1]}: give one of {', '.join(_STRUCTURED)}", fields.path(name)
            )
        made = _guided(inner, chosen, chosen)
        inner.refuse(_STRUCTURED_UNSUPPORTED)
        inner.done()
        return made
    return _guided(fields, name, name.removeprefix("guided_"))


def _response_format(fields: Fields) -> Constraint | None:
    inner = Fields(fields.table("response_format") or {}, "response_format")
    kind = inner.text("type")
    if kind == "text":
        inner.done()
        return None
    if kind == "json_object":
        inner.done()
        return Constraint(ConstraintKind.JSON_OBJECT)
    if kind != "json_schema":
        raise inner.wrong("type", "text, json_object or json_schema", kind)
    named = Fields(inner.table("json_schema") or {}, "response_format.json_schema")
    named.text("name")
    named.text("description")
    named.flag("strict")  # the schema is enforced in any case
    schema = named.table("schema")
    if schema is None:
        raise named.wrong("schema", "an object", None)
    named.done()
    inner.done()
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def _guided(fields: Fields, name: str, kind: str) -> Constraint:
    if kind == "choice":
        options = fields.texts(name)
        if not options:
            raise fields.wrong(name, "a list of at least one text", [])
        return Constraint(ConstraintKind.CHOICE, options=options)
    if kind == "json_object":
        if not fields.flag(name):
            raise fields.wrong(name, "true, or left out", False)
        return Constraint(ConstraintKind.JSON_OBJECT)
    if kind == "json":
        return Constraint(ConstraintKind.JSON_SCHEMA, _schema(fields, name))
    return Constraint(_KINDS[kind], fields.text(name) or "")


def _schema(fields: Fields, name: str) -> str:
    """A schema as an object, or as text."""
    value: Any = fields.take(name)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return json.dumps(value)
    raise fields.wrong(name, "a JSON schema", value)
