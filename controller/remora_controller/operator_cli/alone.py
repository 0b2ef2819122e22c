"""Groups of commands that list when they are named alone: `remora devices --json`."""

from __future__ import annotations

import typer

from remora_contract.errors import UsageWrong


def is_alone(context: typer.Context, *given: object) -> bool:
    """Whether to list. `given` are the listing's options, empty where they were left out: before
    another command they would mean nothing. Raises UsageWrong."""
    if context.invoked_subcommand is None:
        return True
    if any(value not in (None, "") for value in given):
        name = f"{context.command_path} {context.invoked_subcommand}"
        raise UsageWrong(f"options stand behind the command: `{name} … OPTION`")
    return False
