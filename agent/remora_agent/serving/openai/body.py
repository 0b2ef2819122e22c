"""A request's body: bytes become a JSON object, or a refusal that says why. Pure.

Size is bounded before (by whoever reads the bytes); depth, numbers and text are bounded here.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from remora_agent.serving.openai.errors import FieldInvalid
from remora_contract.errors import DocumentInvalid
from remora_contract.strict import parse

MAX_BODY_BYTES = 4 << 20


def json_object(body: bytes) -> dict[str, Any]:
    """Raises FieldInvalid: not UTF-8, not JSON, no object, a key twice, a number that is none
    (NaN, Infinity, 1e999), half a surrogate pair, nesting beyond 64."""
    try:
        text = body.decode()
    except UnicodeDecodeError as e:
        raise FieldInvalid(f"the body is not UTF-8 at byte {e.start}") from e
    try:
        data = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        raise FieldInvalid(f"the body is not valid JSON: {str(e)[:200]}") from e
    if not isinstance(data, dict):
        raise FieldInvalid(f"the body must be a JSON object, not {type(data).__name__}")
    try:
        checked: dict[str, Any] = parse(_TABLE, data, "body")
    except DocumentInvalid as e:
        raise FieldInvalid(str(e)) from e
    return checked


_TABLE: Any = dict[str, Any]


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is given twice")
    return made
