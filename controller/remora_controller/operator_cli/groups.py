"""`remora groups`: named sets of devices, for selectors."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from remora_contract.errors import NotFound, UsageWrong
from remora_controller.operator_cli import completion, render
from remora_controller.operator_cli.alone import is_alone
from remora_controller.operator_cli.session import Session, connect
from remora_protos.operator.v1 import operator_pb2 as pb

app = typer.Typer(help="Name sets of devices, for selectors: group=NAME.")
Name = Annotated[str, typer.Argument(help="Name of the group.", autocompletion=completion.groups)]


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="groups")


@app.callback(invoke_without_command=True)
def groups(context: typer.Context, as_json: render.Json = None) -> None:
    """Name sets of devices, for selectors: group=NAME. Alone: list them."""
    if is_alone(context, as_json):
        list_(context, as_json)


@app.command()
def create(
    context: typer.Context,
    name: Name,
    device: Annotated[
        list[str] | None,
        typer.Option(help="A device of the group; repeat. The group changes only by hand."),
    ] = None,
    selector: Annotated[
        str,
        typer.Option(
            "--selector",
            "-l",
            help="The devices that match, whenever somebody asks.",
            show_default=False,
        ),
    ] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Change a group that is there already.")
    ] = False,
) -> None:
    """Create a group, of listed devices or of those that match."""
    if bool(device) == bool(selector):
        raise UsageWrong("say which devices: --device ID, or more of them, or --selector")
    session = connect(context)
    request = pb.SaveGroupRequest(
        name=name, device_ids=device or [], selector=selector, replace=replace
    )
    made = session.call(session.stub.SaveGroup, request)
    render.console().print(f"group {made.name} has {made.matching} devices")


@app.command("list")
def list_(context: typer.Context, as_json: render.Json = None) -> None:
    """List groups and how many devices are in each."""
    found = _groups(connect(context))
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    now = time.time()
    rows = [
        (
            g.name,
            g.selector or "listed devices",
            str(g.matching),
            f"{render.ago(g.created_at_unix_s, now)} by {g.created_by}",
        )
        for g in found
    ]
    render.console().print(render.table(("GROUP", "HOLDS", ">DEVICES", "SAVED"), rows))


@app.command()
def show(context: typer.Context, name: Name, as_json: render.Json = None) -> None:
    """Show the devices that are in a group now."""
    session = connect(context)
    found = [g for g in _groups(session) if g.name == name]
    if not found:
        raise NotFound(f"no group {name}; `remora groups list` shows those there are")
    request = pb.ListDevicesRequest(selector=f"group={name}")
    devices = session.call(session.stub.ListDevices, request).devices
    inside = [d.device_id for d in devices]
    if as_json is not None:
        render.print_data({**render.plain(found[0]), "devices": inside}, as_json)
        return
    for device_id in inside:
        print(device_id)


@app.command()
def delete(context: typer.Context, name: Name) -> None:
    """Delete a group that no group and no open rollout names."""
    session = connect(context)
    session.call(session.stub.DeleteGroup, pb.DeleteGroupRequest(name=name))
    render.console().print(f"deleted group {name}")


def _groups(session: Session) -> list[pb.Group]:
    return list(session.call(session.stub.ListGroups, pb.ListGroupsRequest()).groups)
