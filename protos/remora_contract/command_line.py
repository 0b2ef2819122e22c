"""How every Remora command ends: one line on stderr, exit 1 when refused or failed, 2 on usage."""

from __future__ import annotations

import sys

import typer

from remora_contract.errors import RemoraError


def run(app: typer.Typer) -> None:
    """Entry point of a console script."""
    try:
        app()
    except RemoraError as e:
        sys.stderr.write(f"error: {e}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
