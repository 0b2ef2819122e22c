"""The command `remora-agent`: gathers the commands that its parts register. Knows none of them."""

from __future__ import annotations

from importlib import import_module

import typer

from remora_contract.command_line import run

# Each has `register(app: typer.Typer) -> None` and imports what is heavy inside the command.
COMMAND_MODULES = (
    "remora_agent.serving.command",
    "remora_agent.serving.lock_command",
    "remora_agent.batch.command",
    "remora_agent.engine.command",
    "remora_agent.control.command",
    "remora_agent.doctor.command",
)


def build_app() -> typer.Typer:
    app = typer.Typer(
        name="remora-agent",
        help="Serves a language model with hot-swapped adapters on this device.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    for name in COMMAND_MODULES:
        import_module(name).register(app)
    return app


def _root() -> None:
    """Serves a language model with hot-swapped adapters on this device."""


def main() -> None:
    run(build_app())
