"""`remora engines`: what devices built for others of their class."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from remora_contract.digests import short
from remora_contract.errors import Conflict, NotFound
from remora_controller.operator_cli import render
from remora_controller.operator_cli.alone import is_alone
from remora_controller.operator_cli.session import Session, connect
from remora_protos.operator.v1 import operator_pb2 as pb

app = typer.Typer(help="Engines that devices built and share: see docs/engines.md.")


def register(root: typer.Typer) -> None:
    root.add_typer(app, name="engines")


@app.callback(invoke_without_command=True)
def engines(context: typer.Context, as_json: render.Json = None) -> None:
    """Engines that devices built and share: see docs/engines.md. Alone: list them."""
    if is_alone(context, as_json):
        list_(context, as_json)


@app.command("list")
def list_(context: typer.Context, as_json: render.Json = None) -> None:
    """List shared engines: state, size, who built them, how many took them, how many were bad."""
    found = _listed(connect(context))
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    columns = ("KEY", "SITE", "STATE", ">SIZE", "BUILT BY", ">TAKEN", ">BAD", "LAST FAILURE")
    console = render.console()
    console.print(render.table(columns, [_row(e) for e in found.engines]))
    sizes = f"{render.size(found.stored_bytes)} of {render.size(found.max_bytes)}"
    console.print(f"policy {found.policy}; {sizes} taken")


@app.command()
def remove(
    context: typer.Context,
    key: Annotated[str, typer.Argument(help="Build key, or how it begins, as `list` shows it.")],
    site: Annotated[
        str | None, typer.Option(help="Only this site's (default: all with the key).")
    ] = None,
) -> None:
    """Remove a shared engine: nobody fetches it any more, and the next who needs it builds."""
    session = connect(context)
    wanted = key.removeprefix("sha256:")
    found = [
        e
        for e in _listed(session).engines
        if e.key_digest.removeprefix("sha256:").startswith(wanted) and site in (None, e.site)
    ]
    if not found or not wanted:
        raise NotFound(f"no shared engine {key}; `remora engines list` shows those there are")
    if len({e.key_digest for e in found}) > 1:
        raise Conflict(f"{key} is the beginning of several keys; write more of it")
    for engine in found:
        request = pb.RemoveSharedEngineRequest(key_digest=engine.key_digest, site=engine.site)
        session.call(session.stub.RemoveSharedEngine, request)
        where = f" of site {engine.site}" if engine.site else ""
        render.console().print(f"removed engine {short(engine.key_digest)}{where}")


def _listed(session: Session) -> pb.ListSharedEnginesResponse:
    answer: pb.ListSharedEnginesResponse = session.call(
        session.stub.ListSharedEngines, pb.ListSharedEnginesRequest()
    )
    return answer


def _row(engine: pb.SharedEngine) -> tuple[str, ...]:
    by = engine.built_by or "-"
    if engine.built_by:
        by = f"{by}, {render.ago(engine.built_at_unix_s, time.time())}"
    return (
        short(engine.key_digest),
        engine.site or "-",
        engine.state,
        render.size(engine.bytes) if engine.bytes else "-",
        by,
        str(engine.taken),
        str(engine.bad),
        engine.why or "-",
    )
