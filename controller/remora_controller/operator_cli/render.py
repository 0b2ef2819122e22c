"""How answers look: tables for people, JSON for programs. Pure except for the console."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any

import typer
import yaml
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table
from rich.text import Text

from remora_contract.command_line import printable

# True is JSON, False is YAML, None is for people.
Json = Annotated[
    bool | None,
    typer.Option("--json/--yaml", help="Print JSON or YAML.", show_default=False),
]
_PIPE_WIDTH = 240
_STYLES = {
    "online": "green",
    "offline": "yellow",
    "quarantined": "red",
    "removed": "red",
    "COMPLETED": "green",
    "RUNNING": "cyan",
    "PAUSED": "yellow",
    "AWAITING_APPROVAL": "yellow",
    "ABORTING": "yellow",
    "ABORTED": "yellow",
    "ROLLING_BACK": "red",
    "ROLLED_BACK": "red",
    "PASS": "green",
    "FAIL": "red",
    "INCONCLUSIVE": "yellow",
    "succeeded": "green",
    "failed": "red",
    "reverted": "red",
    "kept": "red",
    "apart": "yellow",
    "updating": "cyan",
    "soaking": "cyan",
}


def console() -> Console:
    """Full width into a pipe: a cut-off id is worse than a long line."""
    is_terminal = sys.stdout.isatty()
    width = None if is_terminal else _PIPE_WIDTH
    # What is printed comes from devices: it is text, never markup.
    return Console(highlight=False, markup=False, width=width)


def print_json(data: object) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def print_data(data: object, as_json: bool) -> None:
    """As JSON, or as YAML of the same data."""
    if as_json:
        print_json(data)
    else:
        print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), end="")


def plain(message: Any) -> Any:
    """A message as JSON-ready data: every field, whole numbers as numbers, embedded JSON parsed."""
    if isinstance(message, Message):
        fields = ((f.name, getattr(message, f.name)) for f in message.DESCRIPTOR.fields)
        return dict(_field(name, value) for name, value in fields)
    if isinstance(message, Mapping) or hasattr(message, "items"):
        return {key: plain(value) for key, value in sorted(message.items())}
    if isinstance(message, (str, int, float, bool)):
        return message
    return [plain(item) for item in message]


def _field(name: str, value: Any) -> tuple[str, Any]:
    if name.endswith("_json"):
        return name.removesuffix("_json"), json.loads(value) if value else None
    return name, plain(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]]) -> Table:
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        name = column.removeprefix(">")
        made.add_column(name, justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(c if isinstance(c, Text) else Text(printable(c)) for c in row))
    return made


def styled(word: str) -> Text:
    return Text(printable(word), style=_STYLES.get(word, ""))


def size(count: float) -> str:
    """1536 -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("the last unit takes everything")


def duration(seconds: float) -> str:
    """How people say it: `12 s`, `3 min`, `2 h`, `4 d`."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / divisor:.0f} {unit}"
    return f"{seconds / 86_400:.0f} d"


def ago(at: float, now: float) -> str:
    return f"{duration(max(0.0, now - at))} ago" if at else "never"


def clock_time(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="seconds")


def labels_text(labels: Mapping[str, str]) -> str:
    return ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
