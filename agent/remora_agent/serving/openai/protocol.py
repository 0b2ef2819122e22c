"""HTTP/1.1 as uvicorn speaks it, with an end to every kind of waiting for the other side.

    a request that does not arrive whole within `ARRIVAL_S`      (slow senders)
    a connection that asks nothing for `ARRIVAL_S` at its begin  (idle ones; later: keep-alive)
    a reader that takes nothing for `STALL_S`                    (slow readers)

are cut off, and so is a connection beyond the most that may be open; everybody else goes on
meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Collection
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from remora_agent.serving.descriptors import MAX_CONNECTIONS

log = logging.getLogger(__name__)
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
ARRIVAL_S = 60.0
STALL_S = 60.0


class BoundedProtocol(H11Protocol):
    """One connection. A subclass of a test shortens the times."""

    arrival_s = ARRIVAL_S
    stall_s = STALL_S

    def __init__(
        self,
        *args: Any,
        allowed_users: Collection[int] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        **kwargs: Any,
    ) -> None:
        """`allowed_users`: who may call over a unix socket; None: whom its mode lets in."""
        super().__init__(*args, **kwargs)
        self._allowed_users = allowed_users
        self._max_connections = max_connections
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            log.info("http.full", extra={"connections": self._max_connections})
            transport.abort()
            return
        user = _user(transport.get_extra_info("socket"))
        if user is not None:
            self.client = (f"uid:{user}", 0)  # as gRPC's callers there are named
            if self._allowed_users is not None and user not in self._allowed_users:
                log.warning("http.user_refused", extra={"uid": user})
                transport.abort()
                return
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._arrived():
            self._arrival = _cancelled(self._arrival)
        elif self._arrival is None:
            self._expect()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall = _cancelled(self._stall)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrival, self._stall = _cancelled(self._arrival), _cancelled(self._stall)
        super().connection_lost(exc)

    def _arrived(self) -> bool:
        """Whether the request that began last is here as a whole."""
        cycle = self.cycle
        return cycle is not None and (cycle.response_complete or not cycle.more_body)

    def _expect(self) -> None:
        self._arrival = self.loop.call_later(self.arrival_s, self.transport.abort)


def _user(connection: socket.socket) -> int | None:
    """The user behind a unix socket, as the kernel says; None behind any other."""
    if connection.family != socket.AF_UNIX:
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    if timer is not None:
        timer.cancel()
    return None
