"""`remora adapters` and `remora bundles`: what is published, who serves it, and shipping it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from remora_contract.digests import short
from remora_controller.operator_cli import gate_options as more
from remora_controller.operator_cli import render, rollouts
from remora_controller.operator_cli import spec_options as spec
from remora_controller.operator_cli.alone import is_alone
from remora_controller.operator_cli.devices import Selector
from remora_controller.operator_cli.releases import list_artifacts
from remora_controller.operator_cli.rollouts import Watch
from remora_controller.operator_cli.session import connect
from remora_protos.operator.v1 import operator_pb2 as pb

_SHOWN_DEVICES = 4
app = typer.Typer(help="List published adapters; ship one to devices.")


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="adapters")
    root.command()(bundles)


@app.callback(invoke_without_command=True)
def adapters(context: typer.Context, as_json: render.Json = None) -> None:
    """List published adapters; ship one to devices. Alone: list them."""
    if is_alone(context, as_json):
        list_(context, as_json)


@app.command("list")
def list_(context: typer.Context, as_json: render.Json = None) -> None:
    """List published adapters and which devices serve each revision."""
    session = connect(context)
    found = list_artifacts(session, "adapter")
    devices = session.call(session.stub.ListDevices, pb.ListDevicesRequest()).devices
    serving = {a.digest: _serving(a.digest, devices) for a in found}
    _print(found, serving, as_json)


def bundles(context: typer.Context, as_json: render.Json = None) -> None:
    """List published bundles and which devices run each."""
    session = connect(context)
    found = list_artifacts(session, "bundle")
    devices = session.call(session.stub.ListDevices, pb.ListDevicesRequest()).devices
    running = {
        a.digest: [d.device_id for d in devices if d.bundle_digest == a.digest] for a in found
    }
    _print(found, running, as_json)


def _serving(digest: str, devices: Sequence[pb.Device]) -> list[str]:
    return [d.device_id for d in devices if any(a.digest == digest for a in d.adapters)]


def _print(found: list[pb.Artifact], used: dict[str, list[str]], as_json: bool | None) -> None:
    if as_json is not None:
        rows = [{**render.plain(a), "devices": used[a.digest]} for a in found]
        render.print_data(rows, as_json)
        return
    now = time.time()
    columns = ("NAME", "REVISION", "DIGEST", ">SIZE", "BASE", "PUBLISHED", "ON DEVICES")
    lines = [
        (
            a.name,
            a.revision,
            short(a.digest),
            render.size(a.bytes),
            short(a.base_digest),
            render.ago(a.published_at_unix_s, now),
            _names(used[a.digest]),
        )
        for a in found
    ]
    render.console().print(render.table(columns, lines))


def _names(devices: list[str]) -> str:
    shown = ", ".join(devices[:_SHOWN_DEVICES])
    more = len(devices) - _SHOWN_DEVICES
    return f"{shown} and {more} more" if more > 0 else shown or "-"


@app.command()
def ship(
    context: typer.Context,
    adapter: Annotated[
        list[str],
        typer.Argument(help="NAME=REF: the name requests use, and what it becomes; or more."),
    ],
    selector: Selector = "",
    base: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Release to change (default: the one that all matching devices run).",
            show_default=False,
        ),
    ] = None,
    wave: spec.Wave = None,
    soak: spec.Soak = spec.DEFAULT_SOAK_S,
    threshold: spec.Threshold = 1.0,
    wave_timeout: spec.WaveTimeout = None,
    max_unavailable: spec.MaxUnavailable = 0,
    gate: more.GateOption = None,
    stratify: more.Stratify = None,
    not_before: more.NotBefore = None,
    window: more.WindowOption = None,
    device_bandwidth: more.DeviceBandwidth = None,
    bandwidth: more.Bandwidth = None,
    skip_refused: spec.SkipRefused = False,
    supersede: spec.Supersede = False,
    needs_approval: spec.NeedsApproval = False,
    watch: Watch = False,
    as_json: render.Json = None,
) -> None:
    """Ship adapters: roll out what devices run, with these adapters changed. `remora plan
    --adapter` shows beforehand what comes of it."""
    rollouts.start(
        context,
        base,
        adapter=adapter,
        selector=selector,
        wave=wave,
        soak=soak,
        threshold=threshold,
        wave_timeout=wave_timeout,
        max_unavailable=max_unavailable,
        gate=gate,
        stratify=stratify,
        not_before=not_before,
        window=window,
        device_bandwidth=device_bandwidth,
        bandwidth=bandwidth,
        skip_refused=skip_refused,
        supersede=supersede,
        needs_approval=needs_approval,
        watch=watch,
        as_json=as_json,
    )
