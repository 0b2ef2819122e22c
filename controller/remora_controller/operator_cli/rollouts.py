"""`remora rollout`: bringing a release to devices, and watching it arrive."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from remora_contract.command_line import printable
from remora_contract.errors import UsageWrong
from remora_controller.domain import RolloutState
from remora_controller.operator_cli import completion, render
from remora_controller.operator_cli import gate_options as more
from remora_controller.operator_cli import spec_options as spec
from remora_controller.operator_cli.devices import Selector
from remora_controller.operator_cli.events import print_events
from remora_controller.operator_cli.following import (
    await_final,
    check_completed,
    follow,
    get_rollout,
)
from remora_controller.operator_cli.release_document import pairs
from remora_controller.operator_cli.rollout_view import rollout_view
from remora_controller.operator_cli.session import Session, connect
from remora_controller.operator_cli.shipping import ship_release
from remora_protos.operator.v1 import operator_pb2 as pb

_APPROVAL = "somebody else: `remora rollout approve"
app = typer.Typer(help="Start, watch, pause, abort rollouts.", no_args_is_help=True)
RolloutId = Annotated[
    str | None,
    typer.Argument(
        help="A rollout id (default: the newest).",
        show_default=False,
        autocompletion=completion.rollouts,
    ),
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Follow until it ends.")]


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="rollout")


@app.command()
def start(
    context: typer.Context,
    release: Annotated[
        str | None,
        typer.Argument(
            help="A release id, or a name for its newest (with --adapter: left out).",
            show_default=False,
            autocompletion=completion.releases,
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=REF: what the devices run, with this adapter changed; repeat."),
    ] = None,
    selector: Selector = "",
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
    """Start a rollout: wave by wave, stopping and going back by itself when too many fail."""
    wanted = spec.spec_message(wave, soak, threshold, wave_timeout, max_unavailable)
    gates = [more.gate_of_text(text) for text in gate or []]
    limits = (device_bandwidth, bandwidth)
    more.add_to(wanted, gates, stratify or [], not_before, window or [], *limits)
    session = connect(context)
    request = pb.StartRolloutRequest(
        release=_chosen_release(session, release, adapter or [], selector),
        selector=selector,
        spec=wanted,
        skip_refused=skip_refused,
        supersede=supersede,
        needs_approval=needs_approval,
    )
    launch(session, request, watch, as_json)


def launch(
    session: Session, request: pb.StartRolloutRequest, watch: bool, as_json: bool | None
) -> None:
    """Starts, says so, and follows if asked."""
    made = session.call(session.stub.StartRollout, request)
    if as_json is None:
        render.console().print(
            f"started rollout {made.rollout_id} of {made.release_id} on {len(made.devices)} "
            f"devices in {made.waves} waves"
            + (f"; it waits for {_APPROVAL} {made.rollout_id}`" if _waits(made) else "")
        )
    _then(session, made, watch, as_json)


def _then(session: Session, made: pb.Rollout, watch: bool, as_json: bool | None) -> None:
    """One document on standard output: how it began, or, watched, how it ended."""
    if watch:
        follow(session, made.rollout_id, as_json)
    elif as_json is not None:
        render.print_data(render.plain(made), as_json)


def _waits(made: pb.Rollout) -> bool:
    return made.state == RolloutState.AWAITING_APPROVAL.value


def _chosen_release(
    session: Session, release: str | None, adapters: list[str], selector: str
) -> str:
    if adapters:
        changed = pairs(adapters, "--adapter", "NAME=REF")
        return ship_release(session, changed, selector, base=release)
    if release is None:
        raise UsageWrong("name a RELEASE, or an adapter to change with --adapter NAME=REF")
    return release


@app.command()
def status(
    context: typer.Context,
    rollout: RolloutId = None,
    watch: Watch = False,
    as_json: render.Json = None,
) -> None:
    """Show where each device of a rollout is."""
    session = connect(context)
    found = get_rollout(session, rollout)
    if watch:
        follow(session, found.rollout_id, as_json)
    elif as_json is not None:
        render.print_data(render.plain(found), as_json)
    else:
        render.console().print(rollout_view(found))


@app.command()
def wait(
    context: typer.Context,
    rollout: RolloutId = None,
    timeout: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to wait (default: for ever).", show_default=False),
    ] = None,
) -> None:
    """Wait until a rollout ends. Exits 0 if it completed, 1 if it ended otherwise, 4 if the time is
    up, 5 if it is paused."""
    session = connect(context)
    rollout_id = get_rollout(session, rollout).rollout_id
    found = await_final(session, rollout_id, timeout, lambda _: None)
    check_completed(found)
    render.console().print(f"{rollout_id} is {found.state}: {printable(found.reason)}")


@app.command("list")
def list_(context: typer.Context, as_json: render.Json = None) -> None:
    """List rollouts, newest first."""
    session = connect(context)
    found = session.call(session.stub.ListRollouts, pb.ListRolloutsRequest()).rollouts
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    now = time.time()
    rows = [
        (
            r.rollout_id,
            render.styled(r.state),
            r.release_id,
            f"{r.wave}/{r.waves}",
            r.selector or "all",
            f"{render.ago(r.created_at_unix_s, now)} by {r.created_by}",
        )
        for r in found
    ]
    columns = ("ROLLOUT", "STATE", "RELEASE", "WAVE", "SELECTOR", "STARTED")
    render.console().print(render.table(columns, rows))


@app.command()
def pause(context: typer.Context, rollout: RolloutId = None) -> None:
    """Touch no further device; those that are changing finish."""
    session = connect(context)
    request = pb.RolloutActionRequest(rollout_id=get_rollout(session, rollout).rollout_id)
    _say(session.call(session.stub.PauseRollout, request))


@app.command()
def approve(
    context: typer.Context,
    rollout: Annotated[
        str,
        typer.Argument(
            help="The rollout's id: say which you looked at.", autocompletion=completion.rollouts
        ),
    ],
) -> None:
    """Let a rollout begin that somebody else started with --needs-approval."""
    session = connect(context)
    request = pb.RolloutActionRequest(rollout_id=rollout)
    _say(session.call(session.stub.ApproveRollout, request))


@app.command()
def history(context: typer.Context, rollout: RolloutId = None, as_json: render.Json = None) -> None:
    """Show what happened to a rollout and who did it, oldest first."""
    session = connect(context)
    request = pb.RolloutHistoryRequest(rollout_id=get_rollout(session, rollout).rollout_id)
    print_events(session.call(session.stub.RolloutHistory, request).events, as_json)


@app.command()
def resume(
    context: typer.Context,
    rollout: RolloutId = None,
    accept_gates: Annotated[
        bool,
        typer.Option(
            "--accept-gates",
            help="Go on although gates of the waves so far fail or lack evidence. Later waves are "
            "judged again.",
        ),
    ] = False,
) -> None:
    """Go on with a paused rollout."""
    session = connect(context)
    request = pb.RolloutActionRequest(
        rollout_id=get_rollout(session, rollout).rollout_id, accept_gates=accept_gates
    )
    _say(session.call(session.stub.ResumeRollout, request))


@app.command()
def retry(
    context: typer.Context,
    rollout: RolloutId = None,
    skip_refused: spec.SkipRefused = False,
    supersede: spec.Supersede = False,
    watch: Watch = False,
    as_json: render.Json = None,
) -> None:
    """Try an ended rollout again: a new rollout of the same release with the same options."""
    session = connect(context)
    request = pb.RetryRolloutRequest(
        rollout_id=get_rollout(session, rollout).rollout_id,
        skip_refused=skip_refused,
        supersede=supersede,
    )
    made = session.call(session.stub.RetryRollout, request)
    if as_json is None:
        render.console().print(
            f"started rollout {made.rollout_id}, attempt {made.attempt} of {made.release_id} on "
            f"{len(made.devices)} devices in {made.waves} waves"
        )
    _then(session, made, watch, as_json)


@app.command()
def abort(
    context: typer.Context,
    rollout: RolloutId = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave devices as they are instead of going back.")
    ] = False,
) -> None:
    """Stop a rollout; every device it touched goes back to its last good release."""
    session = connect(context)
    rollout_id = get_rollout(session, rollout).rollout_id
    request = pb.AbortRolloutRequest(rollout_id=rollout_id, keep=keep)
    _say(session.call(session.stub.AbortRollout, request))


def _say(found: pb.Rollout) -> None:
    render.console().print(
        Text.assemble(f"rollout {found.rollout_id} is ", render.styled(found.state))
    )
