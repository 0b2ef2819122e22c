"""Writing to a caller who reads slowly or not at all."""

from __future__ import annotations

import asyncio
import selectors

import pytest

from remora_agent.serving.writing import write
from remora_contract.errors import DeadlineExceeded


class Reader:
    """A call's context whose peer takes each message after `after_s`; None: never."""

    def __init__(self, after_s: float | None) -> None:
        self._after_s = after_s
        self.taken: list[object] = []

    async def write(self, message: object) -> None:
        await (asyncio.Event().wait() if self._after_s is None else asyncio.sleep(self._after_s))
        self.taken.append(message)


class Hurrying(selectors.DefaultSelector):
    """Where nothing else happens the time to wait has passed at once, however busy the machine."""

    now = 0.0

    def select(self, timeout=None):
        found = super().select(0)
        if not found and timeout:
            self.now += timeout
        return found


def run(main):
    """On a loop whose clock only waiting moves."""
    hurrying = Hurrying()
    loop = asyncio.SelectorEventLoop(hurrying)
    loop.time = lambda: hurrying.now
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()


def test_a_caller_who_takes_nothing_ends_the_call_with_a_reason():
    async def main() -> None:
        with pytest.raises(DeadlineExceeded, match=r"nothing .* was read for 0\.01 s"):
            await write(Reader(None), "x", 0.01)
        await asyncio.sleep(0)  # the task is no longer being cancelled

    asyncio.run(main())


def test_a_slow_caller_who_reads_on_gets_everything():
    async def main() -> list[object]:
        reader = Reader(0.01)
        for i in range(30):  # longer together than the bound for one
            await write(reader, i, 0.2)
        return reader.taken

    assert run(main()) == list(range(30))


def test_a_call_that_is_cancelled_while_it_waits_is_cancelled_and_not_late():
    async def main() -> None:
        writing = asyncio.ensure_future(write(Reader(None), "x", 60))
        await asyncio.sleep(0.01)
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    asyncio.run(main())
