"""The command `doctor`: what this device can do, and why not. Prints; the checks do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from remora_agent.doctor.check import Check, Verdict, failed, plain

_STYLE = {Verdict.OK: "green", Verdict.WARN: "yellow", Verdict.FAIL: "bold red"}


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    config: Annotated[
        Path | None,
        typer.Option(help="Also check the agent that this configuration describes."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Say what this device can do and why not. Exits 1 if something needed does not work."""
    from remora_agent.config import load_config
    from remora_agent.doctor.device import device_checks
    from remora_agent.doctor.hardware import hardware_checks

    checks = list(hardware_checks())
    if config is not None:
        checks += device_checks(load_config(config))
    if as_json:
        typer.echo(json.dumps([plain(c) for c in checks], indent=2))
    else:
        _show(checks)
    if failed(checks):
        raise typer.Exit(1)


def _show(checks: Sequence[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for title in ("", "check", "found", "next step"):
        table.add_column(title)
    for check in checks:
        style = _STYLE[check.verdict]
        verdict = f"[{style}]{check.verdict.value}[/]"
        table.add_row(verdict, check.name, escape(check.found), escape(check.next_step))
    Console(highlight=False, markup=True).print(table)
