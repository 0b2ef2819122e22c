"""Versions as numbers, so that they can be compared, and ranges of versions. Pure."""

from __future__ import annotations

MAX_RANGE = 200  # characters


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


def check_range(text: str) -> str:
    """A range as Python packages write it: ">=0.3,<0.5", "==10.3.*", "~=1.23". Raises
    ValueError."""
    # Imported here: most commands compare no versions.
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        found = SpecifierSet(text) if len(text) <= MAX_RANGE else None
    except InvalidSpecifier:
        found = None
    if not found:
        raise ValueError(f"{text[:40]!r} is no range of versions: write '>=0.3' or '>=0.3,<0.5'")
    return text


def is_in_range(version: str, text: str) -> bool | None:
    """None where the version is not known, or is none. `text` as `check_range` takes it."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(text).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return None
