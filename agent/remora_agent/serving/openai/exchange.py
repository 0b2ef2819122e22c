"""One HTTP exchange: reading a bounded body, and answering only as long as somebody listens."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from email.message import Message
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from remora_agent.runtime.api import Share
from remora_agent.serving.openai.body import MAX_BODY_BYTES
from remora_agent.serving.openai.errors import (
    BodyTooLarge,
    FieldInvalid,
    error_object,
    headers_of,
    status_of,
)
from remora_contract.errors import Cancelled, InternalFault, RemoraError

log = logging.getLogger(__name__)
T = TypeVar("T")
Chunks = AsyncGenerator[dict[str, Any], None]
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


async def read_body(request: Request) -> bytes:
    """Raises FieldInvalid (not said to be JSON in UTF-8), BodyTooLarge, Cancelled (the caller
    left)."""
    _check_type(request.headers.get("content-type", ""))
    told = request.headers.get("content-length", "")
    if told.isdecimal() and int(told) > MAX_BODY_BYTES:
        raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
    parts, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Cancelled("the caller left")
        size += len(message.get("body", b""))
        if size > MAX_BODY_BYTES:
            raise BodyTooLarge(f"the body has more than {MAX_BODY_BYTES} bytes")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _check_type(header: str) -> None:
    message = Message()
    message["content-type"] = header
    charset = message.get_content_charset("utf-8")
    if message.get_content_type() != "application/json" or charset not in ("utf-8", "us-ascii"):
        raise FieldInvalid("send JSON in UTF-8 with the header Content-Type: application/json")


def share_of_caller(share: Share, request: Request) -> Share:
    """That of who is connected: the user of a unix socket, else the address; whom the request
    names is one of that caller's clients."""
    host = request.client.host if request.client is not None else ""
    owner = host if not host or host.startswith("uid:") else f"ip:{host}"
    return replace(share, owner=owner)


async def attended(receive: Receive, work: Awaitable[T]) -> T:
    """`work`'s result; it is cancelled when the caller leaves. Raises Cancelled then. The body
    must have been read."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Cancelled("the caller left")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def refusal(error: RemoraError, request_id: str = "") -> Response:
    status = status_of(error)
    log.log(_level(error), "http.refused", extra={"status": status, "why": str(error)[:500]})
    headers = headers_of(error)
    if request_id:
        headers["x-request-id"] = request_id
    return JSONResponse(error_object(error), status, headers)


def _level(error: RemoraError) -> int:
    return logging.ERROR if isinstance(error, InternalFault) else logging.INFO


class ServerSentEvents(Response):
    """Chunks as they come, then [DONE]. An error before the first chunk is a plain refusal, a
    later one the last event."""

    def __init__(self, chunks: Chunks, request_id: str) -> None:
        super().__init__()
        self._chunks, self._id = chunks, request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            answer = await attended(receive, self._stream(send))
        except Cancelled:
            return  # the caller left
        if answer is not None:
            await answer(scope, receive, send)

    async def _stream(self, send: Send) -> Response | None:
        """The refusal to send instead, when nothing was sent."""
        started = False
        async with aclosing(self._chunks) as chunks:
            try:
                async for chunk in chunks:
                    if not started:
                        await send(self._start())
                        started = True
                    await send(_body(chunk))
            except RemoraError as e:
                if not started:
                    return refusal(e, self._id)
                log.log(
                    _level(e), "http.stream_failed", extra={"id": self._id, "why": str(e)[:500]}
                )
                await send(_body(error_object(e)))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return None
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})
        return None

    def _start(self) -> dict[str, Any]:
        headers = [*_SSE_HEADERS, (b"x-request-id", self._id.encode())]
        return {"type": "http.response.start", "status": 200, "headers": headers}


def _body(event: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(event, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return {
        "type": "http.response.body",
        "body": f"data: {text}\n\n".encode(),
        "more_body": True,
    }
