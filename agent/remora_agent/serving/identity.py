"""Who calls, as the connection proves it: what the fair share falls back to when a request names no
client. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from remora_agent.runtime.options import MAX_CLIENT_CHARS
from remora_agent.serving.call import GenerateCall
from remora_contract.digests import digest_bytes

_COMMON_NAME = "x509_common_name"
_PREFIX = "tls:"


def tls_identity(auth: Mapping[str, Iterable[bytes]] | None) -> str:
    """The common name of the caller's certificate, of grpc's `auth_context`; "" without one."""
    names = list((auth or {}).get(_COMMON_NAME, ()))
    if not names:
        return ""
    name = _PREFIX + names[0].decode(errors="replace")
    if len(name) <= MAX_CLIENT_CHARS and name.isprintable():
        return name
    return _PREFIX + digest_bytes(names[0])


def with_client(call: GenerateCall, identity: str) -> GenerateCall:
    """`identity` where the call names no client."""
    if call.share.client:
        return call
    return replace(call, share=replace(call.share, client=identity))
