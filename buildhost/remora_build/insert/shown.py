"""How errors show names that come from a model: quoted, and never long."""

from __future__ import annotations

from collections.abc import Sequence

_MOST_CHARACTERS = 120
_MOST_NAMES = 4


def shown(name: str) -> str:
    return repr(name if len(name) <= _MOST_CHARACTERS else name[:_MOST_CHARACTERS] + "...")


def listed(names: Sequence[str]) -> str:
    """`'a', 'b', 'c', 'd' and 3 more`; empty for none."""
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(shown, names[:_MOST_NAMES])) + more
