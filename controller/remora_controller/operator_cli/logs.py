"""`remora logs`: what a device's agent has logged."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remora_contract.errors import UsageWrong
from remora_controller.operator_cli.asking import ask
from remora_controller.operator_cli.devices import DeviceId
from remora_controller.operator_cli.session import connect
from remora_protos.operator.v1 import operator_pb2 as pb

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
    start = time.time() - span_s(since) if since else 0.0
    request = pb.AskDeviceRequest(
        device_id=device, kind="logs", max_bytes=max_bytes, since_unix_s=start
    )
    text, is_cut = ask(connect(context), request, wait)
    if is_cut:
        Console(stderr=True).print("older lines are left out (--max-bytes)", markup=False)
    if output is None:
        sys.stdout.buffer.write(text)
        return
    temporary = output.with_name(output.name + ".part")
    temporary.write_bytes(text)
    temporary.replace(output)


def span_s(text: str) -> float:
    """Seconds of "90s", "30m", "12h", "2d". Raises UsageWrong."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS_S or not number.isdigit():
        raise UsageWrong(f"--since {text!r}: write a number and s, m, h or d, for example 30m")
    return int(number) * _UNITS_S[unit]
