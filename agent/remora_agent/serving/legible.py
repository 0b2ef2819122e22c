"""Bytes that are no message of the method they came for: refused with a reason.

gRPC would answer them with UNKNOWN, name a Python class and log a traceback for each. Text that is
not UTF-8 is the usual case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from remora_agent.serving.rpc_errors import abort
from remora_contract.errors import RequestInvalid

Deserialize = Callable[[bytes], Any]
Behaviour = Callable[[Any, Any], Awaitable[Any]]
Streaming = Callable[[AsyncIterator[Any], Any], AsyncIterator[Any]]


@dataclass(frozen=True)
class Illegible:
    """What a service receives in place of a message."""

    size: int  # bytes


def legible(message: Any) -> Any:
    """`message`. Raises RequestInvalid when it is Illegible."""
    if isinstance(message, Illegible):
        raise _refusal(message)
    return message


class LegibleRequests(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """For all methods. Handlers that are coroutines and receive a stream ask `legible` of what they
    read; the others are spared it."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        return _guarded(handler_call_details.method.rpartition("/")[2], handler)


def _guarded(method: str, handler: Any) -> Any:
    read, answer = _reading(handler.request_deserializer), handler.response_serializer
    if handler.request_streaming:
        streaming = handler.stream_stream
        if inspect.isasyncgenfunction(streaming):
            streaming = _checked_stream(method, streaming)
        return grpc.stream_stream_rpc_method_handler(streaming, read, answer)
    if handler.response_streaming:
        behaviour = _checked(method, handler.unary_stream)
        return grpc.unary_stream_rpc_method_handler(behaviour, read, answer)
    behaviour = _checked(method, handler.unary_unary)
    return grpc.unary_unary_rpc_method_handler(behaviour, read, answer)


def _reading(deserialize: Deserialize) -> Deserialize:
    def read(raw: bytes) -> Any:
        try:
            return deserialize(raw)
        except DecodeError:
            return Illegible(len(raw))

    return read


def _checked(method: str, behaviour: Behaviour) -> Behaviour:
    @functools.wraps(behaviour)
    async def checked(request: Any, context: Any) -> Any:
        if isinstance(request, Illegible):
            await abort(method, _refusal(request), context)
        return await behaviour(request, context)

    return checked


def _checked_stream(method: str, behaviour: Streaming) -> Streaming:
    @functools.wraps(behaviour)
    async def checked(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async def read() -> AsyncIterator[Any]:
            async for request in requests:
                if isinstance(request, Illegible):
                    await abort(method, _refusal(request), context)
                yield request

        async for reply in behaviour(read(), context):
            yield reply

    return checked


def _refusal(illegible: Illegible) -> RequestInvalid:
    return RequestInvalid(
        f"the {illegible.size} bytes of the request are no message of this method: text must be "
        "UTF-8; make requests with the published .proto"
    )
