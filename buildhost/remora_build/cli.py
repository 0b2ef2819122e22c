"""The command `remora-build`: gathers the commands that its parts register. Knows none of them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import typer

from remora_contract.command_line import run

# Each has `register(app: typer.Typer) -> None` and imports what is heavy inside the command.
COMMAND_MODULES = (
    "remora_build.export.command",
    "remora_build.adapters.command",
    "remora_build.publish.command",
    "remora_build.inspect.command",
)


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="remora-build",
        help="Turns checkpoints and adapters into artifacts for a fleet.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name in COMMAND_MODULES:
        if _installed(name):
            import_module(name).register(app)
    return app


def _root() -> None:
    """Turns checkpoints and adapters into artifacts for a fleet."""


def _installed(module: str) -> bool:
    return find_spec(module.rpartition(".")[0]) is not None and find_spec(module) is not None


def main() -> None:
    run(build_app())
