"""`remora usecases`: adapters with weights under one name, as releases have them and devices serve
them. Grouped here, from what the controller lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from remora_contract.release import Release, ReleaseUseCase
from remora_controller.operator_cli import render
from remora_controller.operator_cli.alone import is_alone
from remora_controller.operator_cli.releases import release_of
from remora_controller.operator_cli.session import connect
from remora_protos.operator.v1 import operator_pb2 as pb

_SHOWN = 4
Running = Annotated[bool, typer.Option("--running", help="Only those that some device serves now.")]
app = typer.Typer(help="List the use cases of releases, and which devices serve them.")


@dataclass(frozen=True)
class Row:
    """One name with one mix of adapters; two releases may mean different things by a name."""

    use_case: str
    adapters: list[dict[str, object]]
    releases: list[str]
    devices: list[str]


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="usecases")


@app.callback(invoke_without_command=True)
def usecases(context: typer.Context, running: Running = False, as_json: render.Json = None) -> None:
    """List the use cases of releases, and which devices serve them. Alone: list them."""
    if is_alone(context, running or None, as_json):
        list_(context, running, as_json)


@app.command("list")
def list_(context: typer.Context, running: Running = False, as_json: render.Json = None) -> None:
    """List use cases with their adapters, the releases that have them, and who serves them."""
    session = connect(context)
    releases = session.call(session.stub.ListReleases, pb.ListReleasesRequest()).releases
    devices = session.call(session.stub.ListDevices, pb.ListDevicesRequest()).devices
    on: dict[str, list[str]] = {}
    for device in devices:
        on.setdefault(device.running_release_id, []).append(device.device_id)
    found = rows(((r.release_id, release_of(r)) for r in releases), on)
    if running:
        found = [row for row in found if row.devices]
    if as_json is not None:
        render.print_data([asdict(row) for row in found], as_json)
        return
    lines = [
        (r.use_case, _mix(r.adapters), _few(r.releases), _few(r.devices) or "-") for r in found
    ]
    columns = ("USE CASE", "ADAPTERS", "IN RELEASES", "ON DEVICES")
    render.console().print(render.table(columns, lines))


def rows(releases: Iterable[tuple[str, Release]], on: Mapping[str, list[str]]) -> list[Row]:
    """By name, then in the order of the releases. `on`: devices by the release they run."""
    found: dict[tuple[ReleaseUseCase, tuple[str, ...]], Row] = {}
    for release_id, release in releases:
        revisions = {a.name: a.revision for a in release.adapters}
        for use_case in release.use_cases:
            named = tuple(f"{a.name}@{revisions[a.name]}" for a in use_case.adapters)
            key = (use_case, named)
            if key not in found:
                weights = [a.weight for a in use_case.adapters]
                mix: list[dict[str, object]] = [
                    {"adapter": n, "weight": w} for n, w in zip(named, weights, strict=True)
                ]
                found[key] = Row(use_case.name, mix, [], [])
            found[key].releases.append(release_id)
            found[key].devices.extend(on.get(release_id, ()))
    return sorted(found.values(), key=lambda row: row.use_case)


def _mix(adapters: list[dict[str, object]]) -> str:
    return ", ".join(f"{a['adapter']}:{a['weight']:g}" for a in adapters) or "none: the base model"


def _few(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
