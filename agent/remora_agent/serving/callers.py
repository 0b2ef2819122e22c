"""Who calls and on whose behalf, as the connection and its metadata say. Pure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, TypeVar

from remora_agent.serving.call import GenerateCall
from remora_agent.serving.embedding import EmbedCall

C = TypeVar("C", GenerateCall, EmbedCall)

TRACE_PARENT = "traceparent"  # metadata key of W3C trace context
USER_PREFIX = "uid-"  # of the socket names that the gate of a unix socket gives its connections
_SUBJECT = "x509_common_name"


def with_caller(call: C, context: Any) -> C:
    """The call in its caller's trace, and in its share unless the call names a client itself.
    `context` is a gRPC servicer's."""
    trace = dict(context.invocation_metadata() or ()).get(TRACE_PARENT, "")
    if isinstance(trace, str) and trace:
        call = replace(call, trace_parent=trace)
    if not call.share.client:
        call = replace(call, share=replace(call.share, client=caller(context)))
    return call


def caller(context: Any) -> str:
    """`cn:NAME` of a client certificate, `uid:NUMBER` on a unix socket, else empty."""
    names = (context.auth_context() or {}).get(_SUBJECT, ())
    if names:
        return f"cn:{names[0].decode(errors='replace')}"
    kind, _, path = context.peer().partition(":")
    name = PurePosixPath(path).name
    if kind == "unix" and name.startswith(USER_PREFIX):
        return f"uid:{name.removeprefix(USER_PREFIX).partition('-')[0]}"
    return ""
