"""`remora events`: what happened, on devices and in the controller."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

import typer

from remora_controller.operator_cli import completion, render
from remora_controller.operator_cli.session import connect
from remora_protos.operator.v1 import operator_pb2 as pb


def register(root: typer.Typer) -> None:
    root.command()(events)


def events(
    context: typer.Context,
    device: Annotated[
        str,
        typer.Option(
            help="Only of this device (default: all).",
            show_default=False,
            autocompletion=completion.devices,
        ),
    ] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 50,
    as_json: render.Json = None,
) -> None:
    """List what happened, newest first."""
    session = connect(context)
    request = pb.ListEventsRequest(device_id=device, limit=limit)
    print_events(session.call(session.stub.ListEvents, request).events, as_json)


def print_events(found: Sequence[pb.Event], as_json: bool | None) -> None:
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    rows = [
        (
            render.clock_time(e.at_unix_s),
            e.device_id or "controller",
            e.name,
            _detail(e.detail_json),
        )
        for e in found
    ]
    render.console().print(render.table(("AT", "WHERE", "EVENT", "DETAIL"), rows))


def _detail(text: str) -> str:
    data = json.loads(text) if text else {}
    if not isinstance(data, dict):
        return str(data)
    return " ".join(f"{key}={value}" for key, value in data.items())
