"""Random JSON schemas whose documents are short, and a check of documents against them."""

from __future__ import annotations

import random
import re
from typing import Any

WORDS = ("id", "name", "naïve", "größe", "日本", 'quo"te', "back\\slash", "a b", "🐟", "tab\t")


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    kinds = ["integer", "string", "enum", "boolean", "null", "const", "pattern"]
    if depth:
        kinds += ["array", "object", "object", "anyOf"]
    return _MAKE[rng.choice(kinds)](rng, depth)


def matches(value: Any, schema: dict[str, Any]) -> bool:
    """Whether `value` is a document of a schema made here."""
    if "anyOf" in schema:
        return any(matches(value, s) for s in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return any(type(value) is type(a) and value == a for a in allowed)
    return _CHECK[schema["type"]](value, schema)


def _integer(rng: random.Random, _: int) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}


def _string(rng: random.Random, _: int) -> dict[str, Any]:
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    least = rng.randint(0, 2)
    items = random_schema(rng, depth - 1)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + 2}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}


_MAKE = {
    "integer": _integer,
    "string": _string,
    "array": _array,
    "object": _object,
    "anyOf": _any_of,
    "boolean": lambda rng, depth: {"type": "boolean"},
    "null": lambda rng, depth: {"type": "null"},
    "enum": lambda rng, depth: {"enum": rng.sample([1, 2.5, None, True, *WORDS], 3)},
    "const": lambda rng, depth: {"const": rng.choice([{"a": [1]}, "x", 7, *WORDS])},
    "pattern": lambda rng, depth: {"type": "string", "pattern": r"^[a-cä]{1,4}-\d{2}$"},
}


def _is_string(value: Any, schema: dict[str, Any]) -> bool:
    if not isinstance(value, str) or not re.search(schema.get("pattern", ""), value):
        return False
    return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 100)


def _is_object(value: Any, schema: dict[str, Any]) -> bool:
    known = schema["properties"]
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= set(value) <= set(known)
        and all(matches(v, known[k]) for k, v in value.items())
    )


_CHECK = {
    "integer": lambda v, s: type(v) is int and s["minimum"] <= v <= s["maximum"],
    "string": _is_string,
    "boolean": lambda v, s: isinstance(v, bool),
    "null": lambda v, s: v is None,
    "array": lambda v, s: (
        isinstance(v, list)
        and s["minItems"] <= len(v) <= s["maxItems"]
        and all(matches(item, s["items"]) for item in v)
    ),
    "object": _is_object,
}
