"""The words of a check: numbers, names, operators. Bounded, because checks come from outside.

A metric's name is written as it is (`ttft_s`, `temperature_celsius.gpu`) or, where it holds other
characters, in double quotes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from remora_contract.errors import RequestInvalid
from remora_contract.gates import MAX_CHECK

MAX_TOKENS = 160
Kind = Literal["number", "name", "metric", "operator", "end"]
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
  | (?P<name>[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z0-9_]+)*)
  | "(?P<metric>[\x20\x21\x23-\x7e]{1,160})"
  | (?P<operator><=|>=|==|!=|[-+*/()<>])
  )""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    kind: Kind
    text: str
    column: int  # from 1


def tokenize(text: str) -> list[Token]:
    """Ends with a token of kind `end`. Raises RequestInvalid naming the column."""
    if len(text) > MAX_CHECK:
        raise RequestInvalid(f"a check has at most {MAX_CHECK} characters, not {len(text)}")
    found: list[Token] = []
    at, end = 0, len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at, end)
        if match is None or match.lastgroup is None:
            column = at + 1 + len(text[at:]) - len(text[at:].lstrip())
            raise RequestInvalid(f"check {text!r}: cannot read column {column}")
        if len(found) == MAX_TOKENS:
            raise RequestInvalid(f"check {text[:80]!r}: more than {MAX_TOKENS} words")
        found.append(_token(match))
        at = match.end()
    return [*found, Token("end", "the end", end + 1)]


def _token(match: re.Match[str]) -> Token:
    kinds: dict[str, Kind] = {
        "number": "number",
        "name": "name",
        "metric": "metric",
        "operator": "operator",
    }
    kind = kinds[str(match.lastgroup)]
    return Token(kind, match[kind], match.start(kind) + 1)
