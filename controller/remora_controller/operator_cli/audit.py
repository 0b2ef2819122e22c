"""`remora audit` and `remora whoami`: who may do what, and who did."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from remora_contract.errors import Refused
from remora_controller.operator_cli import render
from remora_controller.operator_cli.logs import span_s
from remora_controller.operator_cli.session import Session, connect
from remora_protos.operator.v1 import operator_pb2 as pb

_PAGE = 1000


def register(root: typer.Typer) -> None:
    root.command()(audit)
    root.command()(whoami)


def audit(
    context: typer.Context,
    since: Annotated[
        str,
        typer.Option(help="Only of the last 30m, 12h or 7d (default: all).", show_default=False),
    ] = "",
    head: Annotated[
        bool,
        typer.Option(
            "--head",
            help="Print only the log's head, SEQ:HASH: noted elsewhere, it proves later "
            "that nothing before it was changed.",
        ),
    ] = False,
    as_json: render.Json = None,
) -> None:
    """List who changed what, when, from where, and what came of it. Fails when the log was changed
    or cut."""
    start = max(0.0, time.time() - span_s(since)) if since else 0.0
    session = connect(context)
    entries, newest, broken = _all(session, start)
    if head:
        print(f"{newest.seq}:{newest.hash}")
    elif as_json is not None:
        render.print_data(render.plain(entries), as_json)
    else:
        _print(entries)
    if broken:
        raise Refused(f"the audit log is not what was written: {broken}")


def _all(session: Session, since: float) -> tuple[list[pb.AuditEntry], pb.AuditHead, str]:
    """All pages; the head and the finding are the first one's."""
    request = pb.ListAuditRequest(since_unix_s=since, limit=_PAGE)
    first = session.call(session.stub.ListAudit, request)
    entries, page = list(first.entries), first
    while len(page.entries) == _PAGE:
        request.after_seq = page.entries[-1].seq
        page = session.call(session.stub.ListAudit, request)
        entries.extend(page.entries)
    return entries, first.head, first.broken


def _print(entries: list[pb.AuditEntry]) -> None:
    results = {e.answers: e for e in entries if e.answers}
    rows = []
    for entry in (e for e in entries if not e.answers):
        end = results.get(entry.seq, entry)
        rows.append(
            (
                str(entry.seq),
                render.clock_time(entry.at_unix_s),
                f"{entry.who} ({entry.role})" if entry.role else entry.who,
                entry.where,
                entry.what,
                end.result or ("done" if entry.where == "local" else "unknown"),
                end.message or entry.detail_json,
            )
        )
    columns = (">SEQ", "AT", "WHO", "FROM", "WHAT", "RESULT", "DETAIL")
    render.console().print(render.table(columns, rows))


def whoami(context: typer.Context, as_json: render.Json = None) -> None:
    """Show whose credentials these are and what they may do."""
    session = connect(context)
    found = session.call(session.stub.WhoAmI, pb.WhoAmIRequest())
    if as_json is not None:
        render.print_data(render.plain(found), as_json)
        return
    render.console().print(f"{found.name} ({found.role}) at {session.address}")
    render.console().print(f"may call {', '.join(found.may_call)}")
