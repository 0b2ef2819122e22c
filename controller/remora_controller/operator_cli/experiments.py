"""`remora experiments`: what arms counted, whether their rules hold, and making one of them win."""

from __future__ import annotations

from typing import Annotated

import typer

from remora_contract.command_line import printable
from remora_contract.errors import NotFound
from remora_controller.operator_cli import completion, render
from remora_controller.operator_cli import gate_options as more
from remora_controller.operator_cli import spec_options as spec
from remora_controller.operator_cli.alone import is_alone
from remora_controller.operator_cli.devices import Selector
from remora_controller.operator_cli.experiments_view import (
    as_data,
    experiment_view,
    listed,
    rules_table,
)
from remora_controller.operator_cli.following import follow
from remora_controller.operator_cli.plan import print_plan
from remora_controller.operator_cli.rollouts import Watch
from remora_controller.operator_cli.session import Session, connect
from remora_protos.operator.v1 import operator_pb2 as pb

app = typer.Typer(help="Compare the arms of experiments; promote a winner: docs/experiments.md.")
Name = Annotated[
    str, typer.Argument(help="The experiment's name.", autocompletion=completion.experiments)
]
Ended = Annotated[
    bool, typer.Option("--all", help="Also experiments of releases that no device runs now.")
]

WinningArm = Annotated[
    str | None,
    typer.Option("--arm", help="The arm that wins (default: the candidate).", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option(
        "--from",
        help="Release to derive from (default: the one that all matching devices run).",
        show_default=False,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Although its rules do not pass; needs a --reason.")
]
Reason = Annotated[
    str,
    typer.Option("--reason", help="Why it is forced, for the audit log.", show_default=False),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show the rules, the release and the plan; change nothing."),
]


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="experiments")


@app.callback(invoke_without_command=True)
def experiments(context: typer.Context, as_json: render.Json = None) -> None:
    """Compare the arms of experiments; promote a winner. Alone: list them."""
    if is_alone(context, as_json):
        list_(context, as_json=as_json)


@app.command("list")
def list_(
    context: typer.Context,
    selector: Selector = "",
    ended: Ended = False,
    as_json: render.Json = None,
) -> None:
    """List experiments that devices run: each arm with what it counted, summed over devices."""
    found = _asked(connect(context), "", selector, ended)
    if as_json is not None:
        render.print_data([as_data(e) for e in found], as_json)
    else:
        render.console().print(listed(found))


@app.command()
def show(
    context: typer.Context,
    name: Name,
    selector: Selector = "",
    ended: Ended = False,
    as_json: render.Json = None,
) -> None:
    """Show an experiment: arms, shadow, and its rules with the numbers behind their verdicts. Twice
    where devices run it with different bytes, whose counts are never mixed."""
    found = _asked(connect(context), name, selector, ended)
    if not found:
        raise NotFound(
            f"no device runs an experiment {name}; `remora experiments list --all` shows those of "
            "all releases"
        )
    if as_json is not None:
        render.print_data([as_data(e) for e in found], as_json)
        return
    for experiment in found:
        render.console().print(experiment_view(experiment))


@app.command()
def promote(
    context: typer.Context,
    name: Name,
    arm: WinningArm = None,
    selector: Selector = "",
    base: Base = None,
    wave: spec.Wave = None,
    soak: spec.Soak = spec.DEFAULT_SOAK_S,
    threshold: spec.Threshold = 1.0,
    wave_timeout: spec.WaveTimeout = None,
    max_unavailable: spec.MaxUnavailable = 0,
    gate: more.GateOption = None,
    skip_refused: spec.SkipRefused = False,
    supersede: spec.Supersede = False,
    needs_approval: spec.NeedsApproval = False,
    force: Force = False,
    reason: Reason = "",
    dry_run: DryRun = False,
    watch: Watch = False,
    as_json: render.Json = None,
) -> None:
    """Make an arm what the name means: a release without the experiment, and its rollout. Refused
    unless the rules that concern the arm PASS. What the name means anyway needs no rules."""
    wanted = spec.spec_message(wave, soak, threshold, wave_timeout, max_unavailable)
    more.add_to(wanted, [more.gate_of_text(text) for text in gate or []], [], None, [], None, None)
    request = pb.PromotionRequest(
        name=name,
        arm=arm or "",
        release=base or "",
        selector=selector,
        spec=wanted,
        skip_refused=skip_refused,
        supersede=supersede,
        needs_approval=needs_approval,
        force=force,
        reason=reason,
    )
    session = connect(context)
    if dry_run:
        _plan(session, request, as_json)
    else:
        _promote(session, request, watch, as_json)


def _asked(session: Session, name: str, selector: str, ended: bool) -> list[pb.Experiment]:
    request = pb.ListExperimentsRequest(name=name, selector=selector, with_ended=ended)
    return list(session.call(session.stub.ListExperiments, request).experiments)


def _plan(session: Session, request: pb.PromotionRequest, as_json: bool | None) -> None:
    found = session.call(session.stub.PlanPromotion, request)
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    _print_what(found)
    rows = [(d.path, d.before or "-", d.after or "-") for d in found.differences]
    render.console().print(render.table(("WHAT", "BEFORE", "AFTER"), rows))
    print_plan(found.plan)
    if found.refusal:
        render.console().print(f"it would be refused: {printable(found.refusal)}")


def _promote(
    session: Session, request: pb.PromotionRequest, watch: bool, as_json: bool | None
) -> None:
    found = session.call(session.stub.PromoteExperiment, request)
    made = found.rollout
    if as_json is None:
        _print_what(found)
        render.console().print(
            f"started rollout {made.rollout_id} on {len(made.devices)} devices in {made.waves} "
            f"waves; it is {made.state}"
        )
    if watch:
        follow(session, made.rollout_id, as_json)
    elif as_json is not None:
        render.print_data(render.plain(found), as_json)


def _print_what(found: pb.Promotion) -> None:
    console = render.console()
    console.print(
        f"{found.experiment} becomes its arm {found.arm}: release {found.release_id}, derived from "
        f"{found.from_release_id}"
    )
    for note in found.notes:
        console.print(f"note: {printable(note)}")
    if found.rules:
        console.print(rules_table(found.rules))
