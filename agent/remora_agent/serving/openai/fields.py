"""Typed reading of a request's fields. What nobody asked for is refused by name. Pure.

A field that is null counts as left out, as OpenAI's clients send it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from remora_agent.serving.openai.errors import FieldInvalid, FieldUnsupported

# Of fields that are not carried out: the values that change nothing, and the reason.
Refusals = Mapping[str, tuple[Sequence[Any], str]]


class Fields:
    """Of one JSON object. `where` is its path in the request, for errors; "" is the top."""

    def __init__(self, data: Mapping[str, Any], where: str = "") -> None:
        self._data, self._where = data, where
        self._left = {name for name, value in data.items() if value is not None}

    def path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def has(self, name: str) -> bool:
        return self._data.get(name) is not None

    def take(self, name: str) -> Any:
        """None where it is missing or null."""
        self._left.discard(name)
        return self._data.get(name)

    def text(self, name: str, most: int | None = None) -> str | None:
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "text", value)
        if value is not None and most is not None and len(value) > most:
            raise FieldInvalid(f"{self.path(name)}: at most {most} characters", self.path(name))
        return value

    def flag(self, name: str) -> bool | None:
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.take(name)
        if value is None:
            return None
        # 4.0 is a whole number in JSON.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.wrong(name, f"a whole number in {low}..{high}", value)
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, f"a number in {low:g}..{high:g}", value)
        if not low <= value <= high or not math.isfinite(value):
            raise self.wrong(name, f"a number in {low:g}..{high:g}", value)
        return float(value)

    def table(self, name: str) -> dict[str, Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(name, "an object", value)
        return value

    def items(self, name: str) -> list[Any] | None:
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list", value)
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """One text or a list of texts."""
        value = self.take(name)
        if value is None:
            return ()
        if isinstance(value, str):
            return (value,)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(name, "text or a list of texts", value)
        return tuple(value)

    def ids(self, name: str) -> tuple[int, ...]:
        value = self.items(name) or []
        if not is_ids(value):
            raise self.wrong(name, "a list of token ids", value)
        return tuple(value)

    def refuse(self, unsupported: Refusals) -> None:
        """Fields of OpenAI's that only their harmless values may have: (values, why)."""
        for name, (harmless, why) in unsupported.items():
            value = self.take(name)
            if value is not None and not any(_same(value, h) for h in harmless):
                raise FieldUnsupported(
                    f"{self.path(name)} is not supported: {why}; leave it out", self.path(name)
                )

    def done(self) -> None:
        """Raises FieldUnsupported for a field that nobody took."""
        if self._left:
            name = min(self._left)
            shown = self.path(name[:80])
            raise FieldUnsupported(f"{shown} is unknown here; leave it out", shown)

    def wrong(self, name: str, need: str, value: object) -> FieldInvalid:
        return FieldInvalid(
            f"{self.path(name)} must be {need}, not {str(value)[:80]!r}", self.path(name)
        )


def is_ids(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 32 for v in value
    )


def one_of(fields: Fields, names: Iterable[str]) -> str | None:
    """The one of these fields that is given. Raises FieldInvalid for two: neither wins."""
    given = [name for name in names if fields.has(name)]
    if len(given) > 1:
        shown = ", ".join(map(fields.path, given))
        raise FieldInvalid(f"give one of {shown}, not several", fields.path(given[1]))
    return given[0] if given else None


def _same(value: object, harmless: object) -> bool:
    return type(value) is type(harmless) and value == harmless
