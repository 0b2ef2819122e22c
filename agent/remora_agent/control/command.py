"""The commands `join` and `run`: arguments in, one call, words out."""

from __future__ import annotations

import faulthandler
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remora_contract.errors import InvalidInput

DEFAULT_STATE_DIR = Path("/var/lib/remora-agent")
DEFAULT_CONFIG = Path("/etc/remora/agent.toml")


def register(app: typer.Typer) -> None:
    app.command()(join)
    app.command()(run)


def join(
    address: Annotated[
        str, typer.Argument(help="HOST:PORT of the controller's enrolment port, usually 7441.")
    ],
    token: Annotated[
        str,
        typer.Option(
            envvar="REMORA_JOIN_TOKEN",
            help="One-time token from `remora devices token`; in the environment it stays out of "
            "the process list.",
        ),
    ],
    state_dir: Annotated[
        Path, typer.Option(help="The agent's state directory.")
    ] = DEFAULT_STATE_DIR,
    label: Annotated[
        list[str] | None, typer.Option(help="Label of this device, KEY=VALUE; repeat for more.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the identity this device already has.")
    ] = False,
) -> None:
    """Join a fleet: get this device a certificate from its controller."""
    from remora_agent.control.join import JoinPlan
    from remora_agent.control.join import join as join_fleet
    from remora_agent.control.layout import StateLayout
    from remora_contract.join_token import JoinToken

    layout = StateLayout(state_dir.absolute())
    labels = dict(map(_label, label or []))
    plan = JoinPlan(address, JoinToken.decode(token), layout.identity, labels, force)
    layout.create()
    identity = join_fleet(plan)
    console = Console(highlight=False)
    console.print(f"[green]joined as {identity.device_id}[/], controller {identity.controller}")
    console.print("  next: remora-agent run --config agent.toml")


def run(
    config: Annotated[Path, typer.Option(help="The agent's configuration.")] = DEFAULT_CONFIG,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Follow the controller: fetch, build, prove, serve. Ends cleanly on SIGTERM."""
    from remora_agent.config import load_config
    from remora_agent.control.service import run_agent
    from remora_contract import structured_logs

    parsed = load_config(config)
    structured_logs.set_up(log_level)
    # The watchdog's SIGABRT then leaves every thread's stack in the journal.
    faulthandler.enable()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    run_agent(parsed, stop)


def _label(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise InvalidInput(f"--label {text!r}: write KEY=VALUE")
    return key, value
