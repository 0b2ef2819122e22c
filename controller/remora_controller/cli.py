"""`remora-controller`: makes a fleet's authority and serves it."""

from __future__ import annotations

import asyncio
import getpass
import json
import signal
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from remora_contract import command_line, structured_logs, systemd_notify
from remora_contract.errors import Conflict, RequestInvalid
from remora_controller import home as homes
from remora_controller import pki
from remora_controller.audit import AuditDraft
from remora_controller.home import ControllerConfig, Home
from remora_controller.server import Controller, split_address
from remora_controller.store.sqlite import SqliteStore

app = typer.Typer(
    help="The controller of a Remora fleet: enrolment, rollouts, artifacts.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Directory = Annotated[Path, typer.Argument(help="The controller's directory.", show_default=False)]


@app.command()
def init(
    directory: Directory,
    address: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or IP under which devices and operators reach this machine; repeat for "
            "more (default: this machine's host name).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Make a new fleet: its CA, the server's certificate and the first operator's credentials."""
    addresses = address or [socket.gethostname()]
    for name in addresses:
        _check_name(name)
    extra = [a for a in ("localhost", "127.0.0.1", "::1") if a not in addresses]
    home = homes.create(directory, [*addresses, *extra], pki.utc(time.time()))
    console = Console(highlight=False)
    console.print(f"[green]made a controller in {home.root}[/]")
    console.print(f"  next: remora-controller serve {home.root}")
    console.print(f"        export REMORA_CREDENTIALS={home.operator.absolute()}")
    console.print("        remora devices token")
    console.print(f"  keep {home.ca_key} secret and backed up: it is the fleet's root of trust")


@app.command()
def serve(
    directory: Directory,
    repository: Annotated[
        Path | None,
        typer.Option(help="Folder of published artifacts (default: DIRECTORY/repository)."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="HOST:PORT for devices and operators (default: 0.0.0.0:7440)."),
    ] = None,
    enrol_listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for joining devices (default: 0.0.0.0:7441).")
    ] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for Prometheus (default: 127.0.0.1:7442).")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve the fleet until stopped. Port 0 takes a free one and writes it to listening.json."""
    home = homes.open_home(directory)
    config = _overridden(home.load_config(), listen, enrol_listen, metrics_listen)
    structured_logs.set_up(log_level)
    with home.locked():
        asyncio.run(_serve(home, config, repository or home.root / config.repository))


operators = typer.Typer(help="Make and revoke credentials of operators.", no_args_is_help=True)
app.add_typer(operators, name="operator")


@operators.command()
def add(
    directory: Directory,
    name: Annotated[str, typer.Argument(help="Who it is: recorded with everything they do.")],
    out: Annotated[Path, typer.Argument(help="Directory to write the credentials to.")],
    role: Annotated[
        pki.OperatorRole,
        typer.Option(
            help="viewer looks; operator changes; approver looks, approves and stops rollouts; "
            "admin does everything.",
        ),
    ] = pki.OperatorRole.OPERATOR,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of the controller (default: as in DIRECTORY/operator)."),
    ] = None,
) -> None:
    """Make credentials for one more operator; give them OUT over a safe way."""
    home = homes.open_home(directory)
    known = homes.load_toml(homes.OperatorConfig, home.operator / "controller.toml")
    target = address or known.address
    split_address(target)
    _check_name(name)
    with closing(SqliteStore(home.database)) as store:
        if store.is_revoked(name):
            raise Conflict(f"{name} was revoked: a name is not given again; take another one")
        _audit(store, "operator add", {"name": name, "role": role.value})
    homes.write_operator(home.authority(), out, name, role, target, pki.utc(time.time()))
    Console(highlight=False).print(f"[green]made {role.value} credentials for {name} in {out}[/]")


@operators.command()
def revoke(
    directory: Directory,
    name: Annotated[str, typer.Argument(help="Whose credentials count no more, from now on.")],
) -> None:
    """Refuse all credentials of one name, also of a controller that runs. For good."""
    home = homes.open_home(directory)
    _check_name(name)
    with closing(SqliteStore(home.database)) as store:
        _audit(store, "operator revoke", {"name": name})
        is_news = store.revoke_operator(name, time.time())
    Console(highlight=False).print(f"revoked {name}" if is_news else f"{name} was revoked before")


def _audit(store: SqliteStore, what: str, detail: dict[str, str]) -> None:
    """Who may write into the directory needs no credentials; the system's user is what is known."""
    draft = AuditDraft(time.time(), getpass.getuser(), "", "local", what, json.dumps(detail))
    store.append_audit(draft)


async def _serve(home: Home, config: ControllerConfig, repository: Path) -> None:
    controller = Controller(home, config, repository)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        await controller.start()
        systemd_notify.notify(systemd_notify.READY)
        await _until_stopped(controller, stop)
    finally:
        systemd_notify.notify(systemd_notify.STOPPING)
        await controller.stop()


async def _until_stopped(controller: Controller, stop: asyncio.Event) -> None:
    """Feeds the watchdog meanwhile; raises what killed the decision loop."""
    interval = systemd_notify.watchdog_interval_s()
    stopping = asyncio.create_task(stop.wait())
    failing = asyncio.create_task(controller.failed())
    while True:
        done, _ = await asyncio.wait(
            {stopping, failing}, timeout=interval, return_when=asyncio.FIRST_COMPLETED
        )
        if stopping in done:
            failing.cancel()
            return
        if failing in done:
            stopping.cancel()
            failing.result()
            return
        systemd_notify.notify(systemd_notify.WATCHDOG)


def _overridden(
    config: ControllerConfig, listen: str | None, enrol: str | None, metrics: str | None
) -> ControllerConfig:
    changed = {
        "listen": listen or config.listen,
        "enrolment_listen": enrol or config.enrolment_listen,
        "metrics_listen": metrics or config.metrics_listen,
    }
    return ControllerConfig(**{**vars(config), **changed})


def _check_name(name: str) -> None:
    """A host, an IP or a person: something a certificate can carry."""
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:")
    if not name or len(name) > 64 or set(name) - allowed:
        raise RequestInvalid(
            f"{name[:80]!r}: use a name or IP of at most 64 letters, digits, '.', '-', '_'"
        )


def main() -> None:
    command_line.run(app)
