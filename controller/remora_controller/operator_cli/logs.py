"""`remora logs`: what a device's agent has logged."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remora_contract.errors import Refused, UsageWrong
from remora_controller.operator_cli.asking import ask
from remora_controller.operator_cli.devices import DeviceId
from remora_controller.operator_cli.session import connect
from remora_protos.operator.v1 import operator_pb2 as pb

_MOST_DIGITS = 9
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
Wait = Annotated[float, typer.Option(min=0, help="Seconds to wait for the device's answer.")]
app = typer.Typer(help="Read what a device's agent has logged.", no_args_is_help=True)


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="logs")


@app.callback()
def logs() -> None:
    """Read what a device's agent has logged."""


@app.command()
def fetch(
    context: typer.Context,
    device: DeviceId,
    since: Annotated[
        str,
        typer.Option(help="Only the last so long: 90s, 30m, 12h, 2d.", show_default=False),
    ] = "",
    max_bytes: Annotated[
        int, typer.Option(min=1, max=16 << 20, help="At most so many bytes, the newest.")
    ] = 1 << 20,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write here instead of standard output.", show_default=False
        ),
    ] = None,
    wait: Wait = 60.0,
) -> None:
    """Fetch the newest lines of a device's log: JSON, a line each, without prompts and answers."""
    start = max(0.0, time.time() - span_s(since)) if since else 0.0
    if output is not None:
        _check_writable(output)
    request = pb.AskDeviceRequest(
        device_id=device, kind="logs", max_bytes=max_bytes, since_unix_s=start
    )
    text, is_cut = ask(connect(context), request, wait)
    if is_cut:
        Console(stderr=True).print("older lines are left out (--max-bytes)", markup=False)
    if output is None:
        sys.stdout.buffer.write(text)
        return
    _write(output, text)


def _check_writable(output: Path) -> None:
    """Before a device is asked. Raises Refused."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise Refused(f"{output} cannot be written: name a file in a folder that is there")


def _write(output: Path, text: bytes) -> None:
    """Whole, or not at all. Raises Refused."""
    temporary = output.with_name(output.name + ".part")
    try:
        temporary.write_bytes(text)
        temporary.replace(output)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise Refused(f"{output} cannot be written: {e.strerror or e}") from e


def span_s(text: str) -> float:
    """Seconds of "90s", "30m", "12h", "2d". Raises UsageWrong."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not number.isdecimal() or len(number) > _MOST_DIGITS:
        raise UsageWrong(f"--since {text!r}: write a number and s, m, h or d, for example 30m")
    return int(number) * _UNITS_S[unit]
