"""A TCP forwarder that counts what passes: bytes on the wire, TLS and HTTP/2 included."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PIECE = 1 << 16


class CountingForwarder:
    """127.0.0.1:`port` in front of 127.0.0.1:`target`, on a thread of its own. `target` may be
    set once it is known."""

    def __init__(self) -> None:
        self.target = 0
        self.sent = 0  # by clients
        self.received = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def passed(self) -> int:
        return self.sent + self.received

    def start(self) -> None:
        self._thread.start()
        self._server = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10.0)
        self._loop.close()

    def _run(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30.0)

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            self._pump(reader, far_writer, is_sent=True),
            self._pump(far_reader, writer, is_sent=False),
        )

    async def _pump(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_sent: bool
    ) -> None:
        try:
            while piece := await source.read(_PIECE):
                if is_sent:
                    self.sent += len(piece)
                else:
                    self.received += len(piece)
                target.write(piece)
                await target.drain()
        except OSError:
            pass  # one side is gone: the other is told by the close
        finally:
            target.close()


@contextmanager
def counting() -> Iterator[CountingForwarder]:
    forwarder = CountingForwarder()
    forwarder.start()
    try:
        yield forwarder
    finally:
        forwarder.stop()
