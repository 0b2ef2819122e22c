"""Around every call: who is it, may it, and errors as statuses. Owns no business."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn, TypeAlias, TypeVar

import grpc

from remora_contract.errors import Forbidden, RemoraError, Unauthenticated
from remora_contract.rpc import to_status
from remora_controller.pki import Identity, Role, identity_of

S = TypeVar("S")
Q = TypeVar("Q")
A = TypeVar("A")
Context: TypeAlias = grpc.aio.ServicerContext

_WRONG_ROLE = {
    Role.DEVICE: "use the device's own identity (remora-agent)",
    Role.OPERATOR: "use operator credentials (`remora --credentials DIR`)",
    Role.CONTROLLER: "",
}


def caller(context: Context, role: Role) -> Identity:
    """The verified client certificate's identity. Raises Unauthenticated, Forbidden."""
    pems = context.auth_context().get("x509_pem_cert", ())
    if not pems:
        raise Unauthenticated("this port needs a client certificate")
    identity = _identity(bytes(pems[0]))
    if identity.role is not role:
        raise Forbidden(
            f"{identity.role.value} {identity.name} may not call this; {_WRONG_ROLE[role]}"
        )
    return identity


# A certificate is parsed once per process, not once per heartbeat.
_identity = functools.lru_cache(maxsize=16_384)(identity_of)


def unary(
    method: Callable[[S, Q, Context], Awaitable[A]],
) -> Callable[[S, Q, Context], Awaitable[A]]:
    """A handler whose RemoraErrors become gRPC statuses."""

    @functools.wraps(method)
    async def handle(self: S, request: Q, context: Context) -> A:
        try:
            return await method(self, request, context)
        except RemoraError as e:
            await abort(context, e)

    return handle


def streaming(
    method: Callable[[S, Q, Context], AsyncIterator[A]],
) -> Callable[[S, Q, Context], AsyncIterator[A]]:
    @functools.wraps(method)
    async def handle(self: S, request: Q, context: Context) -> AsyncIterator[A]:
        try:
            async for answer in method(self, request, context):
                yield answer
        except RemoraError as e:
            await abort(context, e)

    return handle


async def abort(context: Context, error: RemoraError) -> NoReturn:
    status = to_status(error)
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort raises")
