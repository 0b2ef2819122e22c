"""What a check is, and what a list of them amounts to. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    OK = "ok"
    WARN = "warn"  # works, with less
    FAIL = "fail"  # something needed does not work


@dataclass(frozen=True)
class Check:
    """`next_step` is what to do about it; empty when all is well."""

    name: str
    verdict: Verdict
    found: str
    next_step: str = ""


def ok(name: str, found: str) -> Check:
    return Check(name, Verdict.OK, found)


def warn(name: str, found: str, next_step: str = "") -> Check:
    return Check(name, Verdict.WARN, found, next_step)


def fail(name: str, found: str, next_step: str) -> Check:
    return Check(name, Verdict.FAIL, found, next_step)


def failed(checks: Iterable[Check]) -> bool:
    return any(c.verdict is Verdict.FAIL for c in checks)


def plain(check: Check) -> dict[str, str]:
    """As `doctor --json` shows it."""
    return {
        "name": check.name,
        "verdict": check.verdict.value,
        "found": check.found,
        "next_step": check.next_step,
    }
