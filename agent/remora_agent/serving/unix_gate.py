"""The door of a unix socket: who connects is read from the kernel before a byte goes on.

gRPC cannot tell which user is behind a unix socket. So the public socket is this gate's; gRPC
listens on another one in a directory that only this user may enter, and the gate passes bytes
between the two, unread. It connects from a socket whose name says the caller's user id, which is
what gRPC tells services as the peer. Owns both paths while it is open.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import os
import pwd
import shutil
import socket
import struct
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path

from remora_agent.serving.address import UnixAddress
from remora_agent.serving.callers import USER_PREFIX
from remora_agent.serving.descriptors import max_connections
from remora_contract.errors import Refused, RequestInvalid

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 1024
SILENCE_S = 60.0  # for a connection's first word
_EACH = 3  # descriptors: the caller's, the gate's to gRPC, and gRPC's
_MODE = 0o660
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_PIECE = 64 << 10
_BUSY_S = 0.01


def user_ids(users: Iterable[str]) -> frozenset[int]:
    """Of names and numbers. Raises RequestInvalid for a name that this machine does not know."""
    return frozenset(map(_user_id, users))


class UnixGate:
    """One event loop's. `open`, then `close`."""

    def __init__(self, address: UnixAddress, allowed: Collection[int] | None = None) -> None:
        """`allowed`: user ids; None: everybody whom the socket's mode lets in."""
        self._path = Path(address.path)
        self._allowed = allowed
        self._home = Path(tempfile.mkdtemp(prefix="remora-gate-"))
        self._numbers = itertools.count(1)
        self._open = 0
        self._most = max(1, min(MAX_CONNECTIONS, max_connections() // _EACH))
        self._server: asyncio.Server | None = None

    @property
    def inner(self) -> UnixAddress:
        """Where gRPC is to listen."""
        return UnixAddress(str(self._home / "grpc"))

    async def open(self) -> None:
        """Raises Refused when another process listens there or the path cannot be taken."""
        if _answers(self._path):
            # The path would be taken away from whoever listens there.
            raise Refused(f"cannot listen on unix:{self._path}: another process does")
        if os.path.lexists(self._path) and not self._path.is_socket():
            raise Refused(
                f"cannot listen on unix:{self._path}: something that is no socket lies there; "
                "name a path that is free"
            )
        try:
            self._path.unlink(missing_ok=True)  # the socket of one that was killed
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self._path))
            self._path.chmod(_MODE)  # before it listens, so nobody gets in ahead of it
            self._server = await asyncio.start_unix_server(
                self._serve, sock=listener, limit=_PIECE, backlog=MAX_CONNECTIONS
            )
        except OSError as e:
            raise Refused(f"cannot listen on unix:{self._path}: {e.strerror or e}") from e

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        shutil.rmtree(self._home, ignore_errors=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        user = _user(writer)
        if self._allowed is not None and user not in self._allowed:
            log.warning("gate.refused", extra={"uid": user, "socket": str(self._path)})
        elif self._open >= self._most:
            log.warning("gate.full", extra={"uid": user, "connections": self._open})
        else:
            self._open += 1
            try:
                await self._join(user, reader, writer)
            except OSError as e:
                log.info("gate.broken", extra={"uid": user, "why": str(e)})
            finally:
                self._open -= 1
        writer.close()

    async def _join(
        self, user: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Until either side ends: gRPC has no use for a half-open connection. A connection that
        says nothing costs gRPC nothing, and is closed after a minute."""
        try:
            first = await asyncio.wait_for(reader.read(_PIECE), SILENCE_S)
        except asyncio.TimeoutError:
            return
        if not first:
            return
        inner_reader, inner_writer = await self._connect(user)
        inner_writer.write(first)
        pumps = [
            asyncio.ensure_future(_pump(reader, inner_writer)),
            asyncio.ensure_future(_pump(inner_reader, writer)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            inner_writer.close()

    async def _connect(self, user: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name = self._home / f"{USER_PREFIX}{user}-{next(self._numbers)}"
        with socket.socket(socket.AF_UNIX) as connection:
            connection.setblocking(False)
            connection.bind(str(name))
            try:
                await _connected(connection, self.inner.path)
            finally:
                name.unlink()  # the connection keeps its name
            return await asyncio.open_unix_connection(sock=connection.dup(), limit=_PIECE)


async def _connected(connection: socket.socket, path: str) -> None:
    """A unix socket whose listener is busy says try again, and is not connected later by itself."""
    while (status := connection.connect_ex(path)) == errno.EAGAIN:
        await asyncio.sleep(_BUSY_S)
    if status:
        raise OSError(status, os.strerror(status), path)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As fast as the slower side: at most one piece waits in each buffer."""
    try:
        while piece := await reader.read(_PIECE):
            writer.write(piece)
            await writer.drain()
    except ConnectionError:
        return  # the other side went away, which ends the pair


def _user_id(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as e:
        raise RequestInvalid(f"user {user[:80]!r} does not exist on this machine") from e


def _user(writer: asyncio.StreamWriter) -> int:
    connection = writer.get_extra_info("socket")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(raw)[1])


def _answers(path: Path) -> bool:
    """Whether a process listens there; the socket of one that was killed does not count."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(os.fspath(path)) == 0
