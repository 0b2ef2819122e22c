"""`remora plan`: what a release would cost each device, before anything is shipped."""

from __future__ import annotations

from typing import Annotated

import typer

from remora_contract.digests import canonical_json
from remora_contract.errors import UsageWrong
from remora_controller.operator_cli import completion, render
from remora_controller.operator_cli import gate_options as more
from remora_controller.operator_cli import spec_options as spec
from remora_controller.operator_cli.devices import Selector
from remora_controller.operator_cli.release_document import pairs
from remora_controller.operator_cli.session import connect
from remora_controller.operator_cli.shipping import derived
from remora_protos.operator.v1 import operator_pb2 as pb

_FROM = {"fetched": "from", "waits": "for"}
_SHARING = {
    "off": "engine sharing is off: every device builds its own",
    "site": "engine sharing: within a site (label site, given by an operator)",
    "all": "engine sharing: the whole fleet",
}
Release = Annotated[
    str | None,
    typer.Argument(
        help="A release id, or a name for its newest (with --adapter: left out).",
        show_default=False,
        autocompletion=completion.releases,
    ),
]
Adapter = Annotated[
    list[str] | None,
    typer.Option(help="NAME=REF: what the devices run, with this adapter changed; repeat."),
]


def register(root: typer.Typer) -> None:
    root.command()(plan)


def plan(
    context: typer.Context,
    release: Release = None,
    adapter: Adapter = None,
    selector: Selector = "",
    wave: spec.Wave = None,
    stratify: more.Stratify = None,
    bandwidth: more.Bandwidth = None,
    as_json: render.Json = None,
) -> None:
    """Show what a release would cost each device, and which cannot take it and why. With --adapter
    what `remora adapters ship` would bring; nothing is made for it."""
    if release is None and not adapter:
        raise UsageWrong("name a RELEASE, or an adapter to change with --adapter NAME=REF")
    session = connect(context)
    waves = spec.spec_message(wave, 0, 1, None, 0)
    waves.stratify.extend(stratify or [])
    request = pb.PlanRequest(selector=selector, spec=waves)
    if adapter:
        changed = pairs(adapter, "--adapter", "NAME=REF")
        request.release_json = canonical_json(derived(session, changed, selector, release))
    else:
        request.release = release or ""
    made = session.call(session.stub.Plan, request)
    if as_json is not None:
        render.print_data(render.plain(made), as_json)
    else:
        print_plan(made, more.bytes_per_s("--bandwidth", bandwidth))


def print_plan(made: pb.PlanResponse, total_bytes_per_s: int = 0) -> None:
    """`total_bytes_per_s`: what all devices may download together; 0: as much as they can."""
    columns = ("DEVICE", "WAVE", ">SHIPS", "ENGINE", ">PEAK DISK", ">MEMORY", "REFUSED BECAUSE")
    rows = [
        (
            d.device_id,
            str(d.wave or "-"),
            render.size(d.ship_bytes),
            _engine(d),
            render.size(d.peak_disk_bytes),
            render.size(d.peak_memory_bytes) if d.peak_memory_bytes else "-",
            "; ".join(r.message for r in d.refusals) or "-",
        )
        for d in made.devices
    ]
    console = render.console()
    console.print(render.table(columns, rows))
    waves = ", ".join(made.waves) or "no device takes it"
    shipping = f"{render.size(made.total_bytes)} to ship{_at_least(made, total_bytes_per_s)}"
    console.print(f"{waves}; {shipping}")
    if made.engine_sharing:
        console.print(_SHARING[made.engine_sharing])


def _at_least(made: pb.PlanResponse, total_bytes_per_s: int) -> str:
    if not total_bytes_per_s:
        return ""
    least = render.duration(made.total_bytes / total_bytes_per_s)
    return f", at {render.size(total_bytes_per_s)}/s together at least {least}"


def _engine(plan: pb.DevicePlan) -> str:
    what = plan.engine or ("built" if plan.builds_engine else "kept")  # of an older controller
    if plan.engine_from:
        what = f"{what} {_FROM[what]} {plan.engine_from}"
    if plan.shares_engine:
        what = "built and shared"
    if what.startswith("built") and plan.build_s_known:
        what = f"{what}, about {render.duration(plan.build_s)}"
    return f"{what}: {plan.engine_why}" if plan.engine_why and what != "kept" else what
