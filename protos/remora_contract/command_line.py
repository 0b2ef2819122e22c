"""How every Remora command begins and ends: no telemetry to third parties; one line on stderr, exit
1 when refused or failed, 2 on usage, 4 when the time to wait is up.
"""

from __future__ import annotations

import os
import sys

import typer

from remora_contract.errors import DeadlineExceeded, RemoraError, UsageWrong

TIME_IS_UP = 4


def run(app: typer.Typer) -> None:
    """Entry point of a console script."""
    # From 1.29 on ONNX Runtime reports to its maker unless told otherwise before it is loaded.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        app()
    except RemoraError as e:
        sys.stderr.write(f"error: {printable(str(e))}\n")
        sys.exit(exit_status(e))
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def exit_status(error: RemoraError) -> int:
    if isinstance(error, UsageWrong):
        return 2
    return TIME_IS_UP if isinstance(error, DeadlineExceeded) else 1


def printable(text: str) -> str:
    """`text` in one line that cannot steer a terminal: names come from outside. What cannot be
    printed is shown as an escape."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
