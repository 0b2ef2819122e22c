"""One translation point from the contract's errors to gRPC statuses, for grpc.aio handlers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from remora_contract.errors import InternalFault, RemoraError
from remora_contract.rpc import to_status

log = logging.getLogger(__name__)
S = TypeVar("S")
Handler = Callable[[S, Any, Any], Awaitable[Any]]


def translated(handler: Handler[S]) -> Handler[S]:
    """Wraps `async def Method(self, request, context)`, streaming or not."""

    @functools.wraps(handler)
    async def wrapped(self: S, request: Any, context: Any) -> Any:
        try:
            return await handler(self, request, context)
        except RemoraError as e:
            await abort(handler.__name__, e, context)

    return wrapped


async def abort(method: str, error: RemoraError, context: Any) -> None:
    """Ends the call with `error`'s status and raises what gRPC ends handlers with."""
    level = logging.ERROR if isinstance(error, InternalFault) else logging.INFO
    log.log(level, "rpc.refused", extra={"method": method, "code": error.code, "why": str(error)})
    await context.abort_with_status(to_status(error))
