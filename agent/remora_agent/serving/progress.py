"""How a command shows the progress of an engine build: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from remora_agent.host import Progress

_STEP = 0.1  # lines: one for each phase and for each tenth of it


@contextmanager
def shown(stream: TextIO) -> Iterator[Progress]:
    """Yields what to call with (phase, done 0..1)."""
    if stream.isatty():
        with _bar(stream) as report:
            yield report
    else:
        yield Lines(stream)


class Lines:
    """`rewriting 40 %`, one a line, each tenth once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last: tuple[str, int] | None = None

    def __call__(self, phase: str, done: float) -> None:
        step = (phase, int(done / _STEP + 1e-9))
        if step != self._last:
            self._last = step
            # On a full disk, say: what is told of the work is no reason to end it.
            with suppress(OSError):
                self._stream.write(f"{phase} {done:.0%}\n")
                self._stream.flush()


@contextmanager
def _bar(stream: TextIO) -> Iterator[Progress]:
    columns = (
        TextColumn("remora"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda phase, done: bar.update(task, description=phase, completed=done)
