"""A report as rich tables or as JSON. Knows nothing of what is reported; rich is imported where it
is used, because --json does without."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from remora_contract.command_line import printable

if TYPE_CHECKING:
    from rich.table import Table as RichTable


_UNITS = ("kB", "MB", "GB", "TB", "PB")


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """`facts` and `tables` for people, `data` (JSON-ready) for scripts."""

    title: str
    data: dict[str, Any]
    facts: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...] = field(default=())


def show(report: Report, *, as_json: bool) -> None:
    """Writes the report to standard output."""
    if as_json:
        sys.stdout.write(json.dumps(report.data, indent=2, sort_keys=True) + "\n")
        return
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False, markup=False)  # names from outside are not markup
    console.print(Text(printable(report.title), style="bold"))
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for label, text in report.facts:
        grid.add_row(label, printable(text))
    console.print(grid)
    for table in report.tables:
        console.print(_rich(table))


def show_facts(report: Report, *, as_json: bool) -> None:
    """The same without its tables, as plain text: at the end of a command that has other work."""
    if as_json:
        show(report, as_json=True)
        return
    width = max(len(label) for label, _ in report.facts)
    lines = [f"{label:<{width}}  {printable(text)}" for label, text in report.facts if text]
    sys.stdout.write("\n".join([printable(report.title), *lines, ""]))


def size_text(count: int) -> str:
    """`1.2 MB (1234567)`: decimal units, and the exact number where they round."""
    if count < 1000:
        return f"{count} bytes"
    size, unit = float(count), -1
    while size >= 1000 and unit < len(_UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {_UNITS[unit]} ({count})"


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers as `0-3, 7`."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _rich(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left", header_style="bold")
    for column in table.columns:
        drawn.add_column(column, overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(printable, row))
    return drawn
