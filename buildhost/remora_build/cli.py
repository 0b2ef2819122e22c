"""The command `remora-build`: gathers the commands that its parts register. Knows none of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib import import_module
from types import FrameType, MappingProxyType
from typing import NoReturn

import typer

from remora_contract.command_line import run

# Name -> its module, which has `register(app: typer.Typer) -> None` and imports what is heavy
# inside the command.
COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "export": "remora_build.export.command",
        "adapter": "remora_build.adapters.command",
        "merge": "remora_build.merge.command",
        "use-cases": "remora_build.use_cases.command",
        "publish": "remora_build.publish.command",
        "inspect": "remora_build.inspect.command",
        "insert-lora": "remora_build.insert.command",
        "engine": "remora_build.engine.command",
        "edgellm": "remora_build.edgellm.command",
    }
)


def build_app(names: Collection[str] = tuple(COMMANDS)) -> typer.Typer:
    """With the commands of these names: starting one need not import the others."""
    app = typer.Typer(
        name="remora-build",
        help="Turns checkpoints and adapters into artifacts for a fleet.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name in names:
        import_module(COMMANDS[name]).register(app)
    return app


def needed(arguments: Sequence[str]) -> Collection[str]:
    """The commands that a call with these arguments may ask for: all where it names none of them,
    for the help and for the error that lists them."""
    return arguments[:1] if arguments and arguments[0] in COMMANDS else tuple(COMMANDS)


def _root() -> None:
    """Turns checkpoints and adapters into artifacts for a fleet."""


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    """SIGTERM unwinds as Ctrl-C does, so that what is half written is removed."""
    raise SystemExit(128 + number)


def main() -> None:
    signal.signal(signal.SIGTERM, _terminated)
    run(build_app(needed(sys.argv[1:])))
