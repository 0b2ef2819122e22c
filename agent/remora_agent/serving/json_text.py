"""JSON that a caller wrote becomes an object, or a refusal that says why. Pure.

Whoever reads the text bounds its size; depth, numbers and characters are bounded here.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from remora_contract.errors import DocumentInvalid, RequestInvalid
from remora_contract.strict import parse

_TABLE: Any = dict[str, Any]


def json_table(text: str, what: str) -> dict[str, Any]:
    """`what` the text is, for errors. Raises RequestInvalid: what `json_value` refuses, no object,
    1e999, half a surrogate pair, nesting beyond 64."""
    data = json_value(text, what)
    if not isinstance(data, dict):
        raise RequestInvalid(f"{what} must be a JSON object, not {type(data).__name__}")
    try:
        checked: dict[str, Any] = parse(_TABLE, data, what)
    except DocumentInvalid as e:
        raise RequestInvalid(str(e)) from e
    return checked


def json_value(text: str, what: str) -> Any:
    """Raises RequestInvalid: not JSON, a key twice, NaN or Infinity."""
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise RequestInvalid(f"{what} is not valid JSON: {str(e)[:200]}") from e


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """In one pass: there can be half a million keys."""
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise ValueError(f"the key {key[:80]!r} is given twice")
        made[key] = value
    return made
