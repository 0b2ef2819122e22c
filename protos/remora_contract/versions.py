"""Versions as numbers, so that they can be compared. Pure."""

from __future__ import annotations


def version_numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "1.10.0rc1" -> (1, 10, 0)."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)
