"""Strict reading of config.json: every field is honoured, known to change nothing, or refused by
its name. Owns the rules; knows no family.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from remora_build.families.irrelevant import IRRELEVANT
from remora_contract.errors import CheckpointInvalid, Unsupported


class ConfigFields:
    """One config.json (or a table in it), its fields taken one by one; `finish` refuses what nobody
    took."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.where = where
        self._left = dict(data)

    def take(self, key: str, default: Any = None) -> Any:
        """`default` if it is absent or null."""
        value = self._left.pop(key, default)
        return default if value is None else value

    def default(self, key: str, value: Any) -> None:
        """What an absent field means in this family; null stays null."""
        self._left.setdefault(key, value)

    def nested(self, key: str) -> ConfigFields:
        """The fields of a table inside; none if it is absent."""
        value = self.take(key, {})
        if not isinstance(value, dict):
            raise self.invalid(key, "a table", value)
        return ConfigFields(value, f"{self.where}: {key}")

    def rest(self, *but: str) -> ConfigFields:
        """All that is left, taken, except the fields named."""
        data = {key: value for key, value in self._left.items() if key not in but}
        self._left = {key: value for key, value in self._left.items() if key in but}
        return ConfigFields(data, self.where)

    def left(self) -> dict[str, Any]:
        """What nobody has taken and is not null."""
        return {k: v for k, v in self._left.items() if v is not None}

    def whole(self, key: str, most: int, default: int | None = None) -> int:
        """A whole number from 1 to `most`."""
        return self.check_whole(key, self.take(key, default), most)

    def check_whole(self, key: str, value: Any, most: int) -> int:
        if type(value) is not int or not 1 <= value <= most:
            raise self.invalid(key, f"a whole number from 1 to {most}", value)
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        return self.check_positive(key, self.take(key, default))

    def check_positive(self, key: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value <= sys.float_info.max:
            raise self.invalid(key, "a number above zero", value)
        return float(value)

    def within(self, key: str, least: float, most: float, default: float | None = None) -> float:
        """A number from `least` to `most`."""
        value = self.check_positive(key, self.take(key, default))
        if not least <= value <= most:
            raise self.invalid(key, f"a number from {least:g} to {most:g}", value)
        return value

    def maybe_positive(self, key: str) -> float | None:
        """A finite number above zero, or None if absent or null."""
        value = self.take(key)
        return None if value is None else self.check_positive(key, value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.take(key, default)
        if not isinstance(value, bool):
            raise self.invalid(key, "true or false", value)
        return value

    def only(self, key: str, *allowed: Any, why: str) -> None:
        """The field may be absent or one of `allowed`. Raises Unsupported."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise self.unsupported(key, value, why)

    def ignore(self, *keys: str) -> None:
        """Fields that change nothing in this family."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """A field nobody knows might change the answer. Raises Unsupported naming it."""
        for key, value in self._left.items():
            if key in IRRELEVANT or value is None or value is False or value in ([], {}):
                continue
            raise Unsupported(
                f"{self.where}: field {key!r} is not known to this family, so its effect "
                f"cannot be honoured (it says {str(value)[:80]!r}); remove it from the file "
                "only if it changes nothing"
            )

    def invalid(self, key: str, need: str, have: Any) -> CheckpointInvalid:
        shown = "nothing" if have is None else repr(have)[:80]
        return CheckpointInvalid(f"{self.where}: {key} must be {need}, not {shown}")

    def unsupported(self, key: str, value: Any, why: str) -> Unsupported:
        return Unsupported(f"{self.where}: {key} is {str(value)[:80]!r}: {why}")
