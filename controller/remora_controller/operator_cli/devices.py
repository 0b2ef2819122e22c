"""`remora devices`: who is in the fleet, and how to let one in."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from remora_contract.command_line import printable
from remora_contract.errors import NotFound, UsageWrong
from remora_controller.operator_cli import completion, render
from remora_controller.operator_cli.alone import is_alone
from remora_controller.operator_cli.release_document import pairs
from remora_controller.operator_cli.session import connect
from remora_protos.operator.v1 import operator_pb2 as pb

Selector = Annotated[
    str,
    typer.Option(
        "--selector",
        "-l",
        help="Only devices whose labels match, for example 'site=berlin,tier!=test'.",
        show_default=False,
    ),
]
DeviceId = Annotated[
    str,
    typer.Argument(
        help="A device id, as `remora devices` shows it.", autocompletion=completion.devices
    ),
]
app = typer.Typer(help="List, label, remove devices; make join tokens.")


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="devices")


@app.callback(invoke_without_command=True)
def devices(context: typer.Context, selector: Selector = "", as_json: render.Json = None) -> None:
    """List, label, remove devices; make join tokens. Alone: list them."""
    if is_alone(context, selector, as_json):
        list_(context, selector, as_json)


@app.command("list")
def list_(context: typer.Context, selector: Selector = "", as_json: render.Json = None) -> None:
    """List devices with what they run, and what an operator should see to."""
    session = connect(context)
    found = session.call(session.stub.ListDevices, pb.ListDevicesRequest(selector=selector)).devices
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    now = time.time()
    columns = ("DEVICE", "STATUS", "RUNNING", "PHASE", "LABELS", "MODEL", "SEEN", "NOTE")
    rows = [
        (
            d.device_id,
            render.styled(d.status),
            d.running_release_id or "-",
            d.phase or "-",
            render.labels_text(d.labels),
            d.device_model,
            render.ago(d.last_seen_unix_s, now),
            d.note,
        )
        for d in found
    ]
    render.console().print(render.table(columns, rows))


@app.command()
def show(context: typer.Context, device: DeviceId, as_json: render.Json = None) -> None:
    """Show one device: what it is, what it runs, what went wrong."""
    session = connect(context)
    request = pb.ListDevicesRequest(selector=f"id={device}")
    found = session.call(session.stub.ListDevices, request).devices
    if not found:
        raise NotFound(f"no device {device}; `remora devices` lists those there are")
    if as_json is not None:
        render.print_data(render.plain(found[0]), as_json)
        return
    console = render.console()
    for name, value in render.plain(found[0]).items():
        console.print(Text.assemble((f"{name:>20}", "bold"), "  ", printable(_value(name, value))))


def _value(name: str, value: object) -> str:
    if name == "adapters" and isinstance(value, list):
        return ", ".join(f"{a['name']}@{a['revision']}" for a in value) or "-"
    if name.endswith("_unix_s") and isinstance(value, float):
        return render.clock_time(value) if value else "never"
    if name.endswith("_bytes") and isinstance(value, int):
        return render.size(value)
    if isinstance(value, dict):
        return render.labels_text(value) or "-"
    return str(value) if value not in ("", 0, 0.0) else "-"


@app.command()
def token(
    context: typer.Context,
    label: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE for the device that joins with it; repeat for more."),
    ] = None,
    valid: Annotated[
        float, typer.Option(min=1, help="Seconds until an unused token expires.")
    ] = 3600.0,
    as_json: render.Json = None,
) -> None:
    """Make a one-time join token. Only the token goes to standard output."""
    session = connect(context)
    labels = pairs(label or [], "--label", "KEY=VALUE")
    request = pb.CreateJoinTokenRequest(valid_for_s=valid, labels=labels)
    made = session.call(session.stub.CreateJoinToken, request)
    if as_json is not None:
        render.print_data(render.plain(made), as_json)
    else:
        print(made.token)


@app.command()
def label(
    context: typer.Context,
    device: DeviceId,
    changes: Annotated[list[str], typer.Argument(help="KEY=VALUE sets a label, KEY- removes it.")],
) -> None:
    """Set or remove labels of a device."""
    removed = [c[:-1] for c in changes if "=" not in c and c.endswith("-")]
    set_ = [c for c in changes if "=" in c]
    if len(removed) + len(set_) != len(changes):
        raise UsageWrong("write KEY=VALUE to set a label and KEY- to remove it")
    session = connect(context)
    request = pb.LabelDeviceRequest(
        device_id=device, set=pairs(set_, "label", "KEY=VALUE"), remove=removed
    )
    changed = session.call(session.stub.LabelDevice, request)
    render.console().print(f"{device}: {render.labels_text(changed.labels) or 'no labels'}")


Reason = Annotated[str, typer.Option(help="Why: shown beside the device.", show_default=False)]


@app.command()
def pin(
    context: typer.Context,
    device: DeviceId,
    reason: Reason = "",
    remove: Annotated[bool, typer.Option("--remove", help="Let rollouts reach it again.")] = False,
) -> None:
    """Keep what a device runs, whatever rollouts do."""
    session = connect(context)
    request = pb.PinDeviceRequest(device_id=device, unpin=remove, reason=reason)
    changed = session.call(session.stub.PinDevice, request)
    said = f"pinned: {changed.pin}" if changed.pin else "not pinned"
    render.console().print(f"{device}: {said}")


@app.command()
def quarantine(
    context: typer.Context,
    device: DeviceId,
    reason: Reason = "",
    lift: Annotated[bool, typer.Option("--lift", help="End an operator's quarantine.")] = False,
) -> None:
    """Assign nothing to a device and take nothing from it; what it serves, it serves on."""
    session = connect(context)
    request = pb.QuarantineDeviceRequest(device_id=device, lift=lift, reason=reason)
    changed = session.call(session.stub.QuarantineDevice, request)
    render.console().print(f"{device} is {changed.status}")


@app.command()
def remove(context: typer.Context, device: DeviceId) -> None:
    """Remove a device for good: its certificate is denied from now on."""
    session = connect(context)
    session.call(session.stub.RemoveDevice, pb.RemoveDeviceRequest(device_id=device))
    render.console().print(f"removed {device}; to come back it needs a new join token")
