"""How the demo looks: steps with times, the commands as typed, what they said, tables.

Owns the terminal. Knows nothing of what is told.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

WIDTH = 126  # where there is no terminal to ask


class Account:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = 0
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started

    def title(self, text: str, subtitle: str) -> None:
        self._console.print(Panel(Text(subtitle), title=f"[bold]{text}[/]", border_style="cyan"))

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._steps += 1
        self._console.print()
        self._console.rule(f"[bold cyan]{self._steps}[/] [bold]{title}[/]", align="left")
        started = time.monotonic()
        yield
        self._console.print(f"[green]✓[/] [dim]{time.monotonic() - started:.1f} s[/]")

    @contextmanager
    def running(self, argv: Sequence[str]) -> Iterator[None]:
        """The command as typed; on a terminal also a sign of life until it ends."""
        typed = " ".join(word if "=…" in word else shlex.quote(word) for word in argv)
        self._console.print(Text.assemble(("$ ", "dim"), (typed, "bold")), soft_wrap=True)
        with self._console.status("") if self._console.is_terminal else nullcontext():
            yield

    def say(self, text: str) -> None:
        self._console.print(Padding(Text(text), (0, 0, 0, 2), expand=False))

    def quote(self, output: str) -> None:
        """What a program printed, as it was."""
        text = Text.from_ansi(output.rstrip())
        text.stylize("dim")
        self._console.print(Padding(text, (0, 0, 0, 2), expand=False), soft_wrap=True)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A heading that begins with ">" is aligned to the right."""
        table = Table(box=None, header_style="bold", padding=(0, 2))
        for heading in headings:
            right = heading.startswith(">")
            table.add_column(heading.lstrip(">"), justify="right" if right else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._console.print(Padding(table, (0, 0, 0, 2), expand=False))

    def summary(self, rows: Sequence[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        for name, value in rows:
            table.add_row(Text(name, style="bold"), Text(value))
        self._console.print()
        self._console.print(Panel(table, title="[bold green]It works[/]", border_style="green"))

    def failed(self, message: str) -> None:
        self._console.print()
        self._console.print(
            Panel(Text(message), title="[bold red]The demo failed[/]", border_style="red")
        )


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
