"""The command `remora-build`: gathers the commands that its parts register. Knows none of them."""

from __future__ import annotations

import signal
from importlib import import_module
from types import FrameType
from typing import NoReturn

import typer

from remora_contract.command_line import run

# Each has `register(app: typer.Typer) -> None` and imports what is heavy inside the command.
COMMAND_MODULES = (
    "remora_build.export.command",
    "remora_build.adapters.command",
    "remora_build.merge.command",
    "remora_build.use_cases.command",
    "remora_build.publish.command",
    "remora_build.inspect.command",
    "remora_build.insert.command",
    "remora_build.engine.command",
)


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="remora-build",
        help="Turns checkpoints and adapters into artifacts for a fleet.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name in COMMAND_MODULES:
        import_module(name).register(app)
    return app


def _root() -> None:
    """Turns checkpoints and adapters into artifacts for a fleet."""


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds as Ctrl-C does, so that what is half written is removed."""
    raise SystemExit(128 + number)


def main() -> None:
    signal.signal(signal.SIGTERM, _terminated)
    run(build_app())
