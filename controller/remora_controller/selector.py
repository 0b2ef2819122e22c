"""Label selectors: `site=berlin,tier!=test,gpu in (orin,thor),!legacy`. Pure.

Terms are joined by commas and all must hold:
    key=value  key!=value  key in (a,b)  key notin (a,b)  key  !key
`!=` and `notin` also hold where the key is absent. The empty selector matches every device.
`id` stands for the device id, whatever labels a device has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from remora_contract.errors import RequestInvalid

Operator = Literal["in", "notin", "exists", "absent"]
_WORD = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}"
_KEY = re.compile(_WORD)
_VALUE = re.compile(r"[A-Za-z0-9._/:@+-]{0,128}")
_SET = re.compile(rf"({_WORD})\s+(in|notin)\s*\(([^()]*)\)")
_PAIR = re.compile(rf"({_WORD})\s*(!=|==|=)\s*(.*)")
_ABSENT = re.compile(rf"!\s*({_WORD})")
MAX_LENGTH = 2048


@dataclass(frozen=True)
class Term:
    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        if self.operator == "exists":
            return self.key in labels
        if self.operator == "absent":
            return self.key not in labels
        return (labels.get(self.key) in self.values) == (self.operator == "in")


@dataclass(frozen=True)
class Selector:
    terms: tuple[Term, ...]

    def matches(self, device_id: str, labels: Mapping[str, str]) -> bool:
        seen = {**labels, "id": device_id}
        return all(term.matches(seen) for term in self.terms)


def parse_selector(text: str) -> Selector:
    """Raises RequestInvalid naming the term that cannot be read."""
    if len(text) > MAX_LENGTH:
        raise RequestInvalid(f"a selector has at most {MAX_LENGTH} characters, not {len(text)}")
    if not text.strip():
        return Selector(())
    return Selector(tuple(_term(part.strip(), text) for part in _split(text)))


def _split(text: str) -> list[str]:
    """At commas outside parentheses."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth not in (0, 1):
            raise RequestInvalid(f"selector {text!r}: unbalanced parentheses at column {i + 1}")
        if character == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    if depth:
        raise RequestInvalid(f"selector {text!r}: a parenthesis is not closed")
    return [*parts, text[start:]]


def _term(part: str, whole: str) -> Term:
    if match := _SET.fullmatch(part):
        values = frozenset(_value(v.strip(), part) for v in match[3].split(","))
        return Term(match[1], "in" if match[2] == "in" else "notin", values)
    if match := _PAIR.fullmatch(part):
        value = _value(match[3].strip(), part)
        return Term(match[1], "notin" if match[2] == "!=" else "in", frozenset({value}))
    if match := _ABSENT.fullmatch(part):
        return Term(match[1], "absent")
    if _KEY.fullmatch(part):
        return Term(part, "exists")
    raise RequestInvalid(
        f"selector {whole!r}: cannot read {part!r}; write key=value, key!=value, "
        "key in (a,b), key notin (a,b), key or !key"
    )


def _value(text: str, part: str) -> str:
    if not _VALUE.fullmatch(text):
        raise RequestInvalid(
            f"selector term {part!r}: the value {text[:80]!r} may hold letters, digits and ._/:@+-"
        )
    return text


def check_label(key: str, value: str) -> None:
    """Labels that a selector could name. Raises RequestInvalid."""
    if not _KEY.fullmatch(key) or key == "id":
        raise RequestInvalid(
            f"label key {key[:80]!r}: use letters, digits and ._/-, at most 63 characters"
            + (" ('id' always means the device id)" if key == "id" else "")
        )
    if not _VALUE.fullmatch(value):
        raise RequestInvalid(
            f"label {key}={value[:80]!r}: the value may hold letters, digits and ._/:@+-, "
            "at most 128 characters"
        )
