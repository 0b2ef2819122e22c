"""A constraint as a grammar in llguidance's own form, its size checked first. Pure.

JSON is written as people write it: one space or one line break with its indentation between the
parts, so that an answer cannot go on with blanks for ever.
"""

from __future__ import annotations

import json

from remora_agent.runtime.api import Constraint, ConstraintKind
from remora_contract.errors import RequestInvalid, Unsupported

MAX_GRAMMAR_BYTES = 64 << 10
MAX_OPTIONS = 1024
JSON_WHITESPACE = r"( |\n[ \t]{0,40})?"


def check_constraint(constraint: Constraint) -> None:
    """Raises RequestInvalid for one that is empty or too large, whatever it says."""
    kind = constraint.kind
    if kind is ConstraintKind.CHOICE:
        if not 0 < len(constraint.options) <= MAX_OPTIONS:
            raise RequestInvalid(
                f"constraint.choice: give 1 to {MAX_OPTIONS} options, not {len(constraint.options)}"
            )
        if not all(constraint.options):
            raise RequestInvalid("constraint.choice: an option is empty; give it a text")
    elif constraint.options or (kind is ConstraintKind.JSON_OBJECT and constraint.text):
        raise RequestInvalid(f"constraint.{kind.value} takes nothing of the kind")
    elif kind is not ConstraintKind.JSON_OBJECT and not constraint.text.strip():
        raise RequestInvalid(f"constraint.{kind.value} is empty")
    try:
        size = sum(len(t.encode()) for t in (constraint.text, *constraint.options))
    except UnicodeEncodeError as e:
        raise RequestInvalid(
            f"constraint.{kind.value} holds half a character at index {e.start}"
        ) from e
    if size > MAX_GRAMMAR_BYTES:
        raise RequestInvalid(
            f"constraint.{kind.value} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are compiled"
        )


def grammar_text(constraint: Constraint) -> str:
    """For llguidance's matcher. Raises RequestInvalid, Unsupported (llguidance is missing)."""
    check_constraint(constraint)
    try:
        from llguidance import LLMatcher
    except ImportError as e:
        raise Unsupported("constraint needs the package llguidance: pip install llguidance") from e
    kind, text = constraint.kind, constraint.text
    if kind is ConstraintKind.REGEX:
        return LLMatcher.grammar_from_regex(_expression(text))
    if kind is ConstraintKind.LARK:
        return LLMatcher.grammar_from_lark(text)
    if kind is ConstraintKind.CHOICE:
        return LLMatcher.grammar_from_lark(_choice(constraint.options))
    if kind is ConstraintKind.JSON_OBJECT:
        text = '{"type": "object"}'
    try:
        return LLMatcher.grammar_from_json_schema(
            _schema(text), defaults={"whitespace_pattern": JSON_WHITESPACE}
        )
    except ValueError as e:  # its reader of JSON is stricter than Python's
        raise RequestInvalid(f"constraint.json_schema cannot be read: {e}") from e


def _schema(text: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise RequestInvalid(f"constraint.json_schema is not valid JSON: {e}") from e
    if not isinstance(schema, dict):
        raise RequestInvalid(
            f"constraint.json_schema must be a JSON object, not {type(schema).__name__}"
        )
    return text


def _expression(text: str) -> str:
    """llguidance drops a backslash at the end, instead of calling the expression wrong."""
    if (len(text) - len(text.rstrip("\\"))) % 2:
        raise RequestInvalid("constraint.regex ends with a backslash that escapes nothing")
    return text


def _choice(options: tuple[str, ...]) -> str:
    return "start: " + " | ".join(json.dumps(option) for option in dict.fromkeys(options))
