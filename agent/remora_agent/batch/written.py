"""What batch files write beyond Edge-LLM's format: constraints and biases, read strictly. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from remora_agent.runtime.api import Constraint, ConstraintKind
from remora_agent.runtime.grammar import check_constraint
from remora_contract.errors import DocumentInvalid, RequestInvalid

_TEXTS = {kind.value: kind for kind in (ConstraintKind.REGEX, ConstraintKind.LARK)}
_KINDS = ", ".join(kind.value for kind in ConstraintKind)


def written_constraint(raw: Mapping[str, Any], where: str) -> Constraint:
    """`{kind: value}`; a JSON schema is written as it is or as text. Raises DocumentInvalid."""
    try:
        constraint = _constraint(raw)
        check_constraint(constraint)
    except (ValueError, RequestInvalid) as e:
        raise DocumentInvalid(f"{where}: {e}") from e
    return constraint


def _constraint(raw: Mapping[str, Any]) -> Constraint:
    if len(raw) != 1:
        raise ValueError(f"constraint: give one of {_KINDS}")
    ((kind, value),) = raw.items()
    if kind in _TEXTS and isinstance(value, str):
        return Constraint(_TEXTS[kind], value)
    if kind == "json_schema" and isinstance(value, (str, dict)):
        text = value if isinstance(value, str) else json.dumps(value)
        return Constraint(ConstraintKind.JSON_SCHEMA, text)
    if kind == "json_object" and value is True:
        return Constraint(ConstraintKind.JSON_OBJECT)
    if kind == "choice" and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return Constraint(ConstraintKind.CHOICE, options=tuple(value))
    raise ValueError(
        f"constraint: {kind[:40]} is none of {_KINDS}, or its value is of another kind"
    )


def written_biases(raw: Mapping[str, float], where: str) -> tuple[tuple[int, float], ...]:
    """Token ids are the keys of a JSON object, so text. Raises DocumentInvalid."""
    for token in raw:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise DocumentInvalid(f"{where}: logit_bias: {token[:40]!r} is no token id")
    return tuple((int(token), value) for token, value in raw.items())
