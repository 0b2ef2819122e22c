"""Which bank columns of a group belong to whom, and how many columns are bound. Pure.

A group's part p of an adapter takes rank_p columns; B is block-diagonal, so a part's columns write
only its outputs. Any free columns will do: nothing has to be moved together.
"""

from __future__ import annotations

from collections.abc import Sequence

LEAST_BUCKET = 8


def bucket(columns: int, most: int) -> int:
    """How many columns are bound where the first `columns` are in use: 0, or a power of two from
    8 on, at most `most`."""
    if not columns:
        return 0
    size = LEAST_BUCKET
    while size < columns:
        size *= 2
    return min(size, most)


def runs(columns: Sequence[int]) -> list[tuple[int, int, int]]:
    """(index, first column, count) of ascending columns that lie side by side."""
    found: list[tuple[int, int, int]] = []
    for i, column in enumerate(columns):
        if found and found[-1][1] + found[-1][2] == column:
            at, first, count = found[-1]
            found[-1] = (at, first, count + 1)
        else:
            found.append((i, column, 1))
    return found


class Columns:
    """Of one group: 0..most-1, the lowest free ones first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._used: set[int] = set()

    def free(self, count: int) -> tuple[int, ...] | None:
        """The columns that `take` would be given; None when there are not so many."""
        if len(self._used) + count > self.most:
            return None
        chosen: list[int] = []
        column = 0
        while len(chosen) < count:
            if column not in self._used:
                chosen.append(column)
            column += 1
        return tuple(chosen)

    def take(self, columns: Sequence[int]) -> None:
        self._used.update(columns)

    def release(self, columns: Sequence[int]) -> None:
        self._used.difference_update(columns)

    @property
    def end(self) -> int:
        """One past the highest column in use."""
        return max(self._used, default=-1) + 1
