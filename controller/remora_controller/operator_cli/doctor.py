"""`remora devices doctor`: the checks of `remora-agent doctor`, made on a device from afar."""

from __future__ import annotations

import json

import typer
from rich.text import Text

from remora_contract.errors import InternalFault
from remora_controller.operator_cli import render
from remora_controller.operator_cli.asking import ask
from remora_controller.operator_cli.devices import DeviceId
from remora_controller.operator_cli.devices import app as devices
from remora_controller.operator_cli.logs import Wait
from remora_controller.operator_cli.session import connect
from remora_protos.operator.v1 import operator_pb2 as pb

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_FIELDS = ("verdict", "name", "found", "next_step")


def register() -> None:
    devices.command()(doctor)


def doctor(
    context: typer.Context, device: DeviceId, as_json: render.Json = None, wait: Wait = 120.0
) -> None:
    """Check a device: what works there and what to do. Exits 1 if something needed does not."""
    request = pb.AskDeviceRequest(device_id=device, kind="doctor")
    checks = parsed(ask(connect(context), request, wait)[0])
    if as_json is not None:
        render.print_data(checks, as_json)
    else:
        rows = [_row(check) for check in checks]
        render.console().print(render.table(("", "CHECK", "FOUND", "NEXT STEP"), rows))
    if any(c["verdict"] == "fail" for c in checks):
        raise typer.Exit(1)


def _row(check: dict[str, str]) -> list[str | Text]:
    verdict = Text(check["verdict"], style=_STYLES.get(check["verdict"], ""))
    return [verdict, *(check[field] for field in _FIELDS[1:])]


def parsed(text: bytes) -> list[dict[str, str]]:
    """Raises InternalFault when it is no list of checks."""
    try:
        found = json.loads(text)
        return [{field: str(check[field]) for field in _FIELDS} for check in found]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise InternalFault(f"the device's answer is no list of checks: {e!r}") from e
