"""What a rule about a field of PEFT's config is, and the check of a config against a table of them.

Owns no table: carrying (`adapters.fields`) and merging (`merge.fields`) have one each. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from remora_contract.errors import Unsupported

_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


@dataclass(frozen=True)
class Rule:
    kind: Literal["honoured", "neutral", "informational"]
    text: str
    neutral: tuple[Any, ...] = ()  # the values that are accepted

    @property
    def treatment(self) -> str:
        """`honoured`, `accepted`, or with what it is not refused."""
        if self.kind == "honoured":
            return "honoured"
        if self.kind == "informational":
            return "accepted"
        shown = [_spelled(v) for v in self.neutral if v is not None]
        return f"refused unless {' or '.join([*shown, 'null'])}"


def honoured(text: str) -> Rule:
    return Rule("honoured", text)


def refused(*accepted: Any, text: str) -> Rule:
    return Rule("neutral", text, (None, *accepted))


def accepted(text: str) -> Rule:
    return Rule("informational", text)


@dataclass(frozen=True)
class Rules:
    """A rule for each field, of a program that `does` something with an adapter."""

    does: str
    fields: Mapping[str, Rule]

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Raises Unsupported naming the first field that asks for what is not done."""
        for name in sorted(config, key=lambda name: (name != "peft_type", name)):
            rule, value = self.fields.get(name), config[name]
            if rule is None and not _is_one_of(value, _NOTHING):
                raise Unsupported(
                    f"{where}: {name} = {_shown(value)}: this version of remora-build does not "
                    f"know the field and {self.does} nothing it cannot name"
                )
            if rule is not None and rule.kind == "neutral" and not _is_one_of(value, rule.neutral):
                raise Unsupported(f"{where}: {name} = {_shown(value)}: {rule.text}")


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that tells 0 from False and 1 from True, as JSON does."""
    return any(type(value) is type(a) and value == a for a in allowed)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _spelled(value: Any) -> str:
    """As JSON has it, text without its quotes."""
    return value if isinstance(value, str) else json.dumps(value)
