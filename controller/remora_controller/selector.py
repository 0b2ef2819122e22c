"""Selectors: `site=berlin and (gpu in (orin,thor) or not group=canary)`. Pure.

Terms, of which a comma or `and` wants all, `or` any, and `not` the contrary; parentheses group,
`and` binds tighter than `or`:
    key=value  key!=value  key in (a,b)  key notin (a,b)  key  !key
`!=` and `notin` also hold where the key is absent. The empty selector matches every device.
`id` stands for the device id and `group` for the groups a device is in, whatever its labels say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from remora_contract.errors import RequestInvalid

Operator = Literal["in", "notin", "exists", "absent"]
IsIn = Callable[[str], bool]  # is the device in the group of this name?
RESERVED = ("id", "group")
MAX_LENGTH = 2048
MAX_DEPTH = 16
_WORD = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}"
_KEY = re.compile(_WORD)
_VALUE = re.compile(r"[A-Za-z0-9._/:@+-]{0,128}")
_SET = re.compile(rf"({_WORD})\s+(in|notin)\s*\(([^()]*)\)")
_PAIR = re.compile(rf"({_WORD})\s*(!=|==|=)\s*(.*)")
_ABSENT = re.compile(rf"!\s*({_WORD})")
# Keywords only where no label could be meant: `not=1` and `and in (a,b)` are terms.
_NOT = re.compile(r"not(?=[\s(])(?!\s*(?:!?=|(?:in|notin)\s*\())")
_JOIN = re.compile(r"\s*(?:,|\band(?=[\s(!]))")
_OR = re.compile(r"\s*\bor(?=[\s(!])")
_STOP = re.compile(r"[(),]|\s+(?:and|or)(?=[\s(!])")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Term:
    key: str
    operator: Operator
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str], is_in: IsIn) -> bool:
        if self.operator == "exists":
            return self.key in labels
        if self.operator == "absent":
            return self.key not in labels
        return (labels.get(self.key) in self.values) == (self.operator == "in")


@dataclass(frozen=True)
class InGroup:
    """In any of the groups, or with `is_not` in none of them."""

    names: frozenset[str]
    is_not: bool = False

    def matches(self, labels: Mapping[str, str], is_in: IsIn) -> bool:
        return any(is_in(name) for name in sorted(self.names)) != self.is_not


@dataclass(frozen=True)
class Not:
    part: Expression

    def matches(self, labels: Mapping[str, str], is_in: IsIn) -> bool:
        return not self.part.matches(labels, is_in)


@dataclass(frozen=True)
class All:
    parts: tuple[Expression, ...]

    def matches(self, labels: Mapping[str, str], is_in: IsIn) -> bool:
        return all(part.matches(labels, is_in) for part in self.parts)


@dataclass(frozen=True)
class Either:
    parts: tuple[Expression, ...]

    def matches(self, labels: Mapping[str, str], is_in: IsIn) -> bool:
        return any(part.matches(labels, is_in) for part in self.parts)


Expression = Term | InGroup | Not | All | Either


@dataclass(frozen=True)
class Selector:
    """`groups` has what every group that the expression leads to stands for; see `groups.bind`."""

    expression: Expression
    groups: Mapping[str, Expression] = field(default_factory=dict)

    def matches(self, device_id: str, labels: Mapping[str, str]) -> bool:
        """Each group is looked at once, however often it is named."""
        seen = {**labels, "id": device_id}
        known: dict[str, bool] = {}

        def is_in(name: str) -> bool:
            if name not in known:
                known[name] = self.groups[name].matches(seen, is_in)
            return known[name]

        return self.expression.matches(seen, is_in)


def parse_selector(text: str) -> Selector:
    """Raises RequestInvalid naming the term that cannot be read."""
    if len(text) > MAX_LENGTH:
        raise RequestInvalid(f"a selector has at most {MAX_LENGTH} characters, not {len(text)}")
    return Selector(_Reader(text).whole() if text.strip() else All(()))


def group_names(expression: Expression) -> Iterator[str]:
    """Of the groups that the expression itself names."""
    if isinstance(expression, InGroup):
        yield from sorted(expression.names)
    elif isinstance(expression, Not):
        yield from group_names(expression.part)
    elif isinstance(expression, (All, Either)):
        for part in expression.parts:
            yield from group_names(part)


class _Reader:
    """Recursive descent over one selector; `_at` is where it stands."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def whole(self) -> Expression:
        self._check_closings()
        found = self._either(0)
        if rest := self._text[self._at :].strip():
            raise RequestInvalid(
                f"selector {self._text!r}: cannot read {rest!r} after a parenthesis"
            )
        return found

    def _check_closings(self) -> None:
        depth = 0
        for at, character in enumerate(self._text):
            depth += (character == "(") - (character == ")")
            if depth < 0:
                raise self._unbalanced(at)

    def _either(self, depth: int) -> Expression:
        if depth > MAX_DEPTH:
            raise RequestInvalid(f"selector {self._text!r}: nested deeper than {MAX_DEPTH}")
        parts = [self._all(depth)]
        while self._take(_OR):
            parts.append(self._all(depth))
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _all(self, depth: int) -> Expression:
        parts = [self._one(depth)]
        while self._take(_JOIN):
            parts.append(self._one(depth))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def _one(self, depth: int) -> Expression:
        self._take(_SPACE)
        if self._take(_NOT):
            if depth >= MAX_DEPTH:
                raise RequestInvalid(f"selector {self._text!r}: nested deeper than {MAX_DEPTH}")
            return Not(self._one(depth + 1))
        if not self._text.startswith("(", self._at):
            return _term(self._term_text().strip(), self._text)
        self._at += 1
        found = self._either(depth + 1)
        self._take(_SPACE)
        if not self._text.startswith(")", self._at):
            raise self._not_closed()
        self._at += 1
        self._take(_SPACE)
        return found

    def _term_text(self) -> str:
        """Up to what ends a term; the list of `in (a,b)` belongs to it."""
        start = self._at
        while stop := _STOP.search(self._text, self._at):
            self._at = stop.start()
            if stop[0] != "(":
                return self._text[start : self._at]
            close = self._text.find(")", self._at)
            if close < 0:
                raise self._not_closed()
            inner = self._text.find("(", self._at + 1, close)
            if inner >= 0:
                raise self._unbalanced(inner)
            self._at = close + 1
        self._at = len(self._text)
        return self._text[start:]

    def _take(self, pattern: re.Pattern[str]) -> bool:
        if match := pattern.match(self._text, self._at):
            self._at = match.end()
        return match is not None

    def _unbalanced(self, at: int) -> RequestInvalid:
        return RequestInvalid(f"selector {self._text!r}: unbalanced parentheses at column {at + 1}")

    def _not_closed(self) -> RequestInvalid:
        return RequestInvalid(f"selector {self._text!r}: a parenthesis is not closed")


def _term(part: str, whole: str) -> Expression:
    if match := _SET.fullmatch(part):
        values = frozenset(_value(v.strip(), part) for v in match[3].split(","))
        return _among(match[1], values, match[2] == "notin")
    if match := _PAIR.fullmatch(part):
        value = _value(match[3].strip(), part)
        return _among(match[1], frozenset({value}), match[2] == "!=")
    if match := _ABSENT.fullmatch(part):
        return Term(_label(match[1], part), "absent")
    if _KEY.fullmatch(part):
        return Term(_label(part, part), "exists")
    raise RequestInvalid(
        f"selector {whole!r}: cannot read {part!r}; write key=value, key!=value, "
        "key in (a,b), key notin (a,b), key or !key, joined by and, or, not and parentheses"
    )


def _among(key: str, values: frozenset[str], is_not: bool) -> Expression:
    if key == "group":
        return InGroup(values, is_not)
    return Term(key, "notin" if is_not else "in", values)


def _label(key: str, part: str) -> str:
    if key == "group":
        raise RequestInvalid(f"selector term {part!r}: say which group: group=NAME")
    return key


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
