"""`remora`: what operators type. Gathers the groups of commands; each knows its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from remora_contract import command_line
from remora_controller.operator_cli import (
    apply,
    artifacts,
    audit,
    devices,
    doctor,
    engines,
    events,
    experiments,
    groups,
    logs,
    plan,
    releases,
    rollouts,
    top,
    usecases,
)
from remora_controller.operator_cli.session import Settings

app = typer.Typer(
    name="remora",
    help="Operate a fleet: devices, releases, rollouts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def root(
    context: typer.Context,
    credentials: Annotated[
        Path | None,
        typer.Option(
            help="Directory of operator credentials (default: $REMORA_CREDENTIALS, then "
            "~/.config/remora).",
            show_default=False,
        ),
    ] = None,
    controller: Annotated[
        str | None,
        typer.Option(
            envvar="REMORA_CONTROLLER",
            help="HOST:PORT of the controller (default: as the credentials say).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Operate a fleet: devices, releases, rollouts."""
    context.obj = Settings(credentials, controller)


devices.register(app)
doctor.register()
releases.register(app)
plan.register(app)
rollouts.register(app)
artifacts.register(app)
usecases.register(app)
experiments.register(app)
top.register(app)
events.register(app)
logs.register(app)
groups.register(app)
audit.register(app)
engines.register(app)
apply.register(app)


def main() -> None:
    command_line.run(app)
