"""A check's text -> a typed tree: comparisons of numbers, joined by and, or, not. Pure.

    condition   := conjunction ("or" conjunction)*
    conjunction := negation ("and" negation)*
    negation    := "not" negation | sum (("<"|"<="|">"|">="|"=="|"!=") sum)?
    sum         := product (("+"|"-") product)*
    product     := factor (("*"|"/") factor)*
    factor      := "-" factor | NUMBER | METRIC | FUNCTION "(" METRIC ")" | ROLLOUT_VALUE
                 | "baseline" "(" condition ")" | "(" condition ")"

A bare metric is its average. `error_rate` is failed requests by requests. Numbers and conditions
are told apart while reading, so `avg(a < b)` or `1 and 2` is refused, with the column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from remora_contract.errors import RequestInvalid
from remora_controller.gates.tokens import Token, tokenize

MAX_DEPTH = 24
FUNCTIONS = ("avg", "min", "max", "last", "count", "p50", "p90", "p95", "p99", "increase", "rate")
# What the rollout itself counts.
FAILURE_FRACTION, FAILED = "failure_fraction", "failed_devices"
UNREACHABLE, UNREACHABLE_FRACTION = "unreachable_devices", "unreachable_fraction"
ROLLOUT_VALUES = (FAILURE_FRACTION, FAILED, UNREACHABLE, UNREACHABLE_FRACTION)
REQUESTS, REQUESTS_FAILED = "requests_total", "requests_failed_total"
_WORDS = ("and", "or", "not")
_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Measured:
    function: str
    metric: str


@dataclass(frozen=True)
class Counted:
    """A value of the rollout itself."""

    name: str


@dataclass(frozen=True)
class Baseline:
    """The same of the incumbent, on the same devices."""

    of: NumberNode


@dataclass(frozen=True)
class Arithmetic:
    operator: str
    left: NumberNode
    right: NumberNode


@dataclass(frozen=True)
class Comparison:
    operator: str
    left: NumberNode
    right: NumberNode


@dataclass(frozen=True)
class Logic:
    """`and`, `or`; `not` has only one operand."""

    operator: str
    operands: tuple[Condition, ...]


NumberNode = Number | Measured | Counted | Baseline | Arithmetic
Condition = Comparison | Logic
Node = NumberNode | Condition


def parse_check(text: str) -> Condition:
    """Raises RequestInvalid saying where and what was expected."""
    reader = _Reader(text)
    found = reader.condition(0)
    reader.expect_end()
    return reader.as_condition(found, reader.tokens[0])


def leaves(node: Node, is_baseline: bool = False) -> Iterator[tuple[Measured | Counted, bool]]:
    """What has to be measured, and whether of the incumbent; from left to right."""
    if isinstance(node, Measured | Counted):
        yield node, is_baseline
    elif isinstance(node, Baseline):
        yield from leaves(node.of, True)
    elif isinstance(node, Arithmetic | Comparison):
        yield from leaves(node.left, is_baseline)
        yield from leaves(node.right, is_baseline)
    elif isinstance(node, Logic):
        for operand in node.operands:
            yield from leaves(operand, is_baseline)


def metrics_of(node: Node) -> frozenset[str]:
    return frozenset(leaf.metric for leaf, _ in leaves(node) if isinstance(leaf, Measured))


def spelled(node: NumberNode) -> str:
    """As people write it."""
    if isinstance(node, Number):
        return f"{node.value:g}"
    if isinstance(node, Measured):
        return f"{node.function}({node.metric})"
    if isinstance(node, Counted):
        return node.name
    if isinstance(node, Baseline):
        return f"baseline({spelled(node.of)})"
    if node == _ERROR_RATE:
        return "error_rate"
    return f"({spelled(node.left)} {node.operator} {spelled(node.right)})"


_ERROR_RATE = Arithmetic("/", Measured("increase", REQUESTS_FAILED), Measured("increase", REQUESTS))


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = tokenize(text)
        self._at = 0

    def condition(self, depth: int) -> Node:
        return self._joined("or", self._conjunction, depth)

    def _conjunction(self, depth: int) -> Node:
        return self._joined("and", self._negation, depth)

    def _joined(self, word: str, operand: Callable[[int], Node], depth: int) -> Node:
        first = self._peek()
        found = operand(depth)
        operands: list[Condition] = []
        while self._takes("name", word):
            operands = operands or [self.as_condition(found, first)]
            after = self._peek()
            operands.append(self.as_condition(operand(depth), after))
        return Logic(word, tuple(operands)) if operands else found

    def _negation(self, depth: int) -> Node:
        if self._takes("name", "not"):
            after = self._peek()
            return Logic("not", (self.as_condition(self._negation(self._deeper(depth)), after),))
        first = self._peek()
        left = self._sum(depth)
        operator = self._peek()
        if operator.kind != "operator" or operator.text not in _COMPARISONS:
            return left
        self._at += 1
        after = self._peek()
        right = self._sum(depth)
        return Comparison(
            operator.text, self._as_number(left, first), self._as_number(right, after)
        )

    def _sum(self, depth: int) -> Node:
        return self._arithmetic(("+", "-"), self._product, depth)

    def _product(self, depth: int) -> Node:
        return self._arithmetic(("*", "/"), self._factor, depth)

    def _arithmetic(
        self, operators: tuple[str, ...], operand: Callable[[int], Node], depth: int
    ) -> Node:
        first = self._peek()
        found = operand(depth)
        while (token := self._peek()).kind == "operator" and token.text in operators:
            self._at += 1
            after = self._peek()
            right = self._as_number(operand(depth), after)
            found = Arithmetic(token.text, self._as_number(found, first), right)
        return found

    def _factor(self, depth: int) -> Node:
        token = self._peek()
        self._at += 1
        if token.kind == "number":
            value = float(token.text)
            if not math.isfinite(value):
                raise self._wrong("a number that a float holds", token)
            return Number(value)
        if token.kind == "metric":
            return Measured("avg", token.text)
        if token.kind == "name" and token.text not in _WORDS:
            return self._named(token, depth)
        if token.text == "-":
            after = self._peek()
            factor = self._as_number(self._factor(self._deeper(depth)), after)
            return Arithmetic("*", Number(-1.0), factor)
        if token.text == "(":
            found = self.condition(self._deeper(depth))
            self._expect(")")
            return found
        raise self._wrong("a number, a metric or a function", token)

    def _named(self, token: Token, depth: int) -> NumberNode:
        if not self._takes("operator", "("):
            if token.text in ROLLOUT_VALUES:
                return Counted(token.text)
            return _ERROR_RATE if token.text == "error_rate" else Measured("avg", token.text)
        if token.text == "baseline":
            after = self._peek()
            of = self._as_number(self.condition(self._deeper(depth)), after)
            self._expect(")")
            return self._baseline(of, after)
        if token.text not in FUNCTIONS:
            raise self._wrong(f"a function ({', '.join((*FUNCTIONS, 'baseline'))})", token)
        metric = self._peek()
        reserved = (*ROLLOUT_VALUES, "error_rate", *_WORDS)
        if metric.kind not in ("name", "metric") or metric.text in reserved:
            raise self._wrong("the name of a metric", metric)
        self._at += 1
        self._expect(")")
        return Measured(token.text, metric.text)

    def _baseline(self, of: NumberNode, token: Token) -> NumberNode:
        for leaf, is_baseline in leaves(of):
            if is_baseline or isinstance(leaf, Counted):
                raise self._wrong("something that a device measures", token)
        return Baseline(of)

    def as_condition(self, node: Node, token: Token) -> Condition:
        if isinstance(node, Comparison | Logic):
            return node
        raise self._wrong("a comparison such as p95(ttft_s) < 0.8", token)

    def _as_number(self, node: Node, token: Token) -> NumberNode:
        if isinstance(node, Comparison | Logic):
            raise self._wrong("a number, not a comparison", token)
        return node

    def expect_end(self) -> None:
        if self._peek().kind != "end":
            raise self._wrong("the end, and, or", self._peek())

    def _expect(self, text: str) -> None:
        if not self._takes("operator", text):
            raise self._wrong(text, self._peek())

    def _takes(self, kind: str, text: str) -> bool:
        token = self._peek()
        taken = token.kind == kind and token.text == text
        self._at += taken
        return taken

    def _peek(self) -> Token:
        return self.tokens[min(self._at, len(self.tokens) - 1)]

    def _deeper(self, depth: int) -> int:
        if depth >= MAX_DEPTH:
            raise RequestInvalid(f"check {self.text[:80]!r}: nested more than {MAX_DEPTH} deep")
        return depth + 1

    def _wrong(self, need: str, token: Token) -> RequestInvalid:
        return RequestInvalid(
            f"check {self.text!r}: column {token.column}: expected {need}, found {token.text!r}"
        )
