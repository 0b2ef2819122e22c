"""The Watch thread outlives what may happen to its connection, and ends when it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from remora_agent.control.pacing import Backoff
from remora_agent.control.watch import Watcher
from remora_contract.errors import Cancelled

WAIT_S = 60.0


class Stream:
    def __init__(self, pokes: int) -> None:
        self._pokes, self._ended = pokes, threading.Event()

    def __iter__(self) -> Iterator[None]:
        for _ in range(self._pokes):
            yield None
        assert self._ended.wait(WAIT_S)

    def cancel(self) -> None:
        self._ended.set()


class Client:
    def __init__(self, stream: Stream | None) -> None:
        self.stream, self.asked = stream, threading.Event()

    def watch(self) -> Stream:
        self.asked.set()
        if self.stream is None:
            raise Cancelled("the connection to the controller was closed")
        return self.stream


def watching(client: Client) -> tuple[Watcher, threading.Event, threading.Thread]:
    poked = threading.Event()
    watcher = Watcher(client, poked.set, lambda: 0.5, Backoff(base_s=0.01, cap_s=0.01))
    thread = threading.Thread(target=watcher.run, daemon=True)
    thread.start()
    return watcher, poked, thread


def test_a_client_that_a_renewal_closed_at_that_moment_does_not_end_the_thread():
    closed = Client(None)
    watcher, poked, thread = watching(closed)
    assert closed.asked.wait(WAIT_S)
    watcher.use(Client(Stream(1)))
    assert poked.wait(WAIT_S) and thread.is_alive()
    watcher.stop()
    thread.join(WAIT_S)
    assert not thread.is_alive()


def test_a_stop_ends_it_while_nothing_comes():
    client = Client(Stream(0))
    watcher, poked, thread = watching(client)
    assert client.asked.wait(WAIT_S)
    watcher.stop()
    thread.join(WAIT_S)
    assert not thread.is_alive() and not poked.is_set()
