"""The commands `lock` and `unlock`: an application asks this device's agent not to switch now."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from remora_contract.errors import UsageWrong

if TYPE_CHECKING:
    from collections.abc import Callable

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smh]?)")
Address = Annotated[
    str, typer.Option(help="The agent's inference address: HOST:PORT on loopback or unix:/path.")
]
Owner = Annotated[str, typer.Option(help="Who asks; each owner has one lock.")]
_DEFAULT_ADDRESS = "127.0.0.1:7450"
_TIMEOUT_S = 10.0


def register(app: typer.Typer) -> None:
    app.command()(lock)
    app.command()(unlock)


def lock(
    duration: Annotated[
        str | None,
        typer.Option("--for", help="How long: 90s, 10m, 1h (default: only show the locks)."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for operators.")] = "",
    owner: Owner = "cli",
    address: Address = _DEFAULT_ADDRESS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the locks as JSON.")] = False,
) -> None:
    """Ask the agent not to switch releases now, or show who asked."""
    from remora_protos.inference.v1 import inference_pb2 as pb

    if duration is None:
        found = _call(address, lambda stub: stub.Status(pb.UpdateLockStatusRequest(), _TIMEOUT_S))
        _show(found, as_json)
        return
    request = pb.LockUpdatesRequest(owner=owner, reason=reason, for_s=seconds(duration))
    _show(_call(address, lambda stub: stub.Lock(request, _TIMEOUT_S)), as_json)


def unlock(owner: Owner = "cli", address: Address = _DEFAULT_ADDRESS) -> None:
    """Let the agent switch again."""
    from remora_protos.inference.v1 import inference_pb2 as pb

    request = pb.UnlockUpdatesRequest(owner=owner)
    _show(_call(address, lambda stub: stub.Unlock(request, _TIMEOUT_S)))


def seconds(text: str) -> float:
    """`90`, `90s`, `10m`, `1h`. Raises UsageWrong."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise UsageWrong(f"--for {text!r}: write 90s, 10m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _call(address: str, call: Callable[[Any], Any]) -> Any:
    import grpc

    from remora_agent.client.connection import raise_from, target
    from remora_protos.inference.v1 import inference_pb2_grpc as rpc

    where = target(address, None)
    with grpc.insecure_channel(where.name(), where.options) as channel:
        try:
            return call(rpc.UpdateLocksStub(channel))
        except grpc.RpcError as e:
            raise_from(e)


def _show(status: Any, as_json: bool = False) -> None:
    if as_json:
        fields = ("owner", "reason", "until_unix_s")
        locks = [{name: getattr(held, name) for name in fields} for held in status.locks]
        typer.echo(json.dumps({"locks": locks, "max_lock_s": status.max_lock_s}, indent=2))
        return
    console = Console(highlight=False, markup=False)
    if not status.locks:
        console.print("no lock: releases switch when they are ready")
    for held in status.locks:
        left = max(0.0, held.until_unix_s - time.time())
        console.print(f"{held.owner}: {left:.0f} s left{held.reason and f', {held.reason}'}")
