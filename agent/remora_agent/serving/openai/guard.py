"""Who may speak to the surface, how many at a time, and in whole requests: stands before every
endpoint."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from remora_agent.serving.openai.exchange import refusal
from remora_agent.serving.openai.keys import ApiKeys
from remora_contract.errors import (
    Exhausted,
    Forbidden,
    RemoraError,
    RequestInvalid,
    Unauthenticated,
)

_OPEN_PATHS = ("/health",)
_RETRY_S = 1.0


class Guard:
    """ASGI. `max_requests` at a time; more are told to come back."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_requests: int) -> None:
        self._app, self._keys, self._max_requests = app, keys, max_requests
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _has_two_ends(scope):
            answer = refusal(RequestInvalid("give Content-Length or Transfer-Encoding, not both"))
            answer.headers["connection"] = "close"  # what follows on it may be anything
            await answer(scope, receive, send)
            return
        error = self._error(scope)
        if error is not None:
            await refusal(error)(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1

    def _error(self, scope: Scope) -> RemoraError | None:
        headers = Headers(scope=scope)
        if scope["path"] in _OPEN_PATHS:
            return None
        if self._keys and not self._keys.admits(headers.get("authorization")):
            return Unauthenticated("give a valid API key: Authorization: Bearer KEY")
        if not self._keys and "origin" in headers:
            # A page of any site can reach loopback from the browser on this machine.
            return Forbidden("calls from web pages need an API key; this agent has none set")
        if self._running >= self._max_requests:
            return Exhausted(f"{self._max_requests} requests run at a time; try again", _RETRY_S)
        return None


def _has_two_ends(scope: Scope) -> bool:
    """A proxy that believes one length and a server that believes the other see two different
    requests: the rest of a caller's body becomes the next caller's request."""
    headers = Headers(scope=scope)
    return "content-length" in headers and "transfer-encoding" in headers
