"""How far an export is: bars on a terminal, one line a stage otherwise, nothing under --json.

Owns presentation; work only says which stage it is in and how much of it is done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

Advance = Callable[[int], None]


class Progress(Protocol):
    def stage(self, title: str, total: int) -> Advance:
        """Begins a stage of `total` units; call the result with units done."""
        ...


class SilentProgress:
    def stage(self, title: str, total: int) -> Advance:
        return lambda done: None


class PlainProgress:
    """One line a stage, for logs."""

    def stage(self, title: str, total: int) -> Advance:
        sys.stderr.write(f"{title}\n")
        return lambda done: None


class BarProgress:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    def stage(self, title: str, total: int) -> Advance:
        task = self._bars.add_task(title, total=total)
        return lambda done: self._bars.advance(task, done)


@contextmanager
def progress_for(console: Console, *, silent: bool) -> Iterator[Progress]:
    """The kind that suits where standard error goes."""
    if silent:
        yield SilentProgress()
    elif not console.is_terminal:
        yield PlainProgress()
    else:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Bars(*columns, console=console) as bars:
            yield BarProgress(bars)
