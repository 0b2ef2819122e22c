"""Who calls, as the connection says, and in which trace. Pure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, TypeVar
from urllib.parse import unquote

from remora_agent.runtime.options import MAX_CLIENT_CHARS
from remora_agent.serving.call import GenerateCall
from remora_agent.serving.embedding import EmbedCall
from remora_contract.digests import digest_bytes

C = TypeVar("C", GenerateCall, EmbedCall)

TRACE_PARENT = "traceparent"  # metadata key of W3C trace context
USER_PREFIX = "uid-"  # of the socket names that the gate of a unix socket gives its connections
_SUBJECT = "x509_common_name"


def with_caller(call: C, context: Any) -> C:
    """The call in its caller's trace and share. A client that the call names is one of that
    caller's. `context` is a gRPC servicer's."""
    trace = dict(context.invocation_metadata() or ()).get(TRACE_PARENT, "")
    if isinstance(trace, str) and trace:
        call = replace(call, trace_parent=trace)
    return replace(call, share=replace(call.share, owner=caller(context)))


def caller(context: Any) -> str:
    """`cn:NAME` of a client certificate, `uid:NUMBER` on a unix socket, else `ip:ADDRESS`; empty
    where the connection says none of these."""
    names = (context.auth_context() or {}).get(_SUBJECT, ())
    if names:
        name = f"cn:{names[0].decode(errors='replace')}"
        fits = len(name) <= MAX_CLIENT_CHARS and name.isprintable()
        return name if fits else f"cn:{digest_bytes(names[0])}"
    kind, _, path = context.peer().partition(":")
    name = PurePosixPath(path).name
    if kind == "unix" and name.startswith(USER_PREFIX):
        return f"uid:{name.removeprefix(USER_PREFIX).partition('-')[0]}"
    if kind in ("ipv4", "ipv6"):
        return f"ip:{unquote(path.rpartition(':')[0]).strip('[]')}"
    return ""
