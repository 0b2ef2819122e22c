"""Following a rollout to its end, through restarts of its controller, and what a script is told."""

from __future__ import annotations

import time
from collections.abc import Callable

import typer
from rich.console import Console
from rich.live import Live

from remora_contract.command_line import printable
from remora_contract.errors import DeadlineExceeded, NotFound, Refused, Unavailable
from remora_controller.domain import FINAL_STATES
from remora_controller.operator_cli import render
from remora_controller.operator_cli.rollout_view import rollout_view
from remora_controller.operator_cli.session import Session
from remora_protos.operator.v1 import operator_pb2 as pb

FINAL = frozenset(state.value for state in FINAL_STATES)
PAUSED = 5  # exit status: nothing goes on before somebody resumes or aborts it
WATCH_S = 0.5
# A controller that restarts, or a network that is away: a rollout goes on without being watched.
PATIENCE_S = 120.0
Clock = Callable[[], float]


def get_rollout(session: Session, rollout_id: str | None) -> pb.Rollout:
    """The newest when no id is given. Raises NotFound."""
    if rollout_id is not None:
        request = pb.GetRolloutRequest(rollout_id=rollout_id)
        found: pb.Rollout = session.call(session.stub.GetRollout, request)
        return found
    answer: pb.ListRolloutsResponse = session.call(
        session.stub.ListRollouts, pb.ListRolloutsRequest()
    )
    if not answer.rollouts:
        raise NotFound("there is no rollout yet; start one with `remora rollout start`")
    return get_rollout(session, answer.rollouts[0].rollout_id)


def follow(session: Session, rollout_id: str, as_json: bool | None = None) -> None:
    """Redraws until the rollout ends; a pipe, JSON and YAML get the end alone. Raises as
    `check_completed`."""
    console = render.console()
    if as_json is None and console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:

            def show(found: pb.Rollout) -> None:
                live.update(rollout_view(found), refresh=True)

            found = await_final(session, rollout_id, None, show)
    else:
        found = await_final(session, rollout_id, None, lambda _: None)
        if as_json is not None:
            render.print_data(render.plain(found), as_json)
        else:
            console.print(rollout_view(found))
    check_completed(found)


def await_final(
    session: Session,
    rollout_id: str,
    timeout_s: float | None,
    show: Callable[[pb.Rollout], None],
) -> pb.Rollout:
    """Also ends when it is paused: nothing would change any more. Raises DeadlineExceeded,
    Unavailable when the controller is silent for long."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        found = patiently(lambda: get_rollout(session, rollout_id), deadline)
        show(found)
        if found.state in FINAL or found.state == "PAUSED":
            return found
        if deadline is not None and time.monotonic() >= deadline:
            raise DeadlineExceeded(
                f"rollout {rollout_id} is still {found.state} after {timeout_s:g} s; see `remora "
                f"rollout status {rollout_id}`"
            )
        time.sleep(WATCH_S)


def patiently(
    ask: Callable[[], pb.Rollout],
    deadline: float | None,
    now: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> pb.Rollout:
    """Asks until there is an answer, for `PATIENCE_S` and not beyond `deadline`. Raises
    Unavailable."""
    silent_since = now()
    is_told = False
    while True:
        try:
            return ask()
        except Unavailable as e:
            last = silent_since + PATIENCE_S
            if now() >= (last if deadline is None else min(deadline, last)):
                raise
            if not is_told:
                Console(stderr=True).print(f"waiting: {printable(str(e))}", markup=False)
            is_told = True
        sleep(WATCH_S)


def check_completed(found: pb.Rollout) -> None:
    """Raises Refused when it ended otherwise; ends the command with status 5 when it is paused."""
    name = found.rollout_id
    if found.state == "COMPLETED":
        return
    said = f"rollout {name} is {found.state}: {found.reason}; see `remora rollout status {name}`"
    if found.state == "PAUSED":
        advice = f"`remora rollout resume {name}` or `remora rollout abort {name}`"
        typer.echo(f"paused: {printable(said)}, then {advice}", err=True)
        raise typer.Exit(PAUSED)
    raise Refused(f"{said} and `remora events`")
