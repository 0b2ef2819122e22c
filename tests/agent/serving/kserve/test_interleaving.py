"""One stream's reading and writing, without a server."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest

from remora_agent.serving.kserve.streams import InferStream
from remora_contract.errors import DeadlineExceeded


class Wire:
    """A call's context: `requests` are there to read, `writing` at most one at a time."""

    def __init__(self, *requests: str, ends: bool = True) -> None:
        self.requests = list(requests)
        self.ends = ends
        self.written: list[str] = []
        self._writing = False

    async def read(self):
        await asyncio.sleep(0)
        if self.requests:
            return self.requests.pop(0)
        return grpc.aio.EOF if self.ends else await asyncio.Event().wait()

    async def write(self, response: str) -> None:
        assert not self._writing, "two writes at a time"
        self._writing = True
        await asyncio.sleep(0)
        self._writing = False
        self.written.append(response)


class Unread(Wire):
    """A client that takes nothing; gRPC has room for one message, and refuses another even when
    the task that wrote the first has been cancelled."""

    async def write(self, response: str) -> None:
        assert not self._writing, "a write beside one that is not taken"
        self._writing = True
        await asyncio.Event().wait()


class Answers:
    """Two responses to each request, the second once it is released."""

    def __init__(self) -> None:
        self.released: dict[str, asyncio.Event] = {}
        self.cancelled: list[str] = []

    async def __call__(self, request):
        self.released[request] = asyncio.Event()
        yield f"{request}1"
        try:
            await self.released[request].wait()
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        if request == "bug":
            raise ZeroDivisionError
        yield f"{request}2"


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_no_more_is_read_while_as_many_as_may_are_under_way():
    async def main():
        wire, answers = Wire("a", "b", "c"), Answers()
        running = asyncio.create_task(InferStream(wire, answers, limit=2).run())
        await settled()
        assert set(answers.released) == {"a", "b"}
        answers.released["b"].set()
        await settled()
        assert set(answers.released) == {"a", "b", "c"}
        for event in answers.released.values():
            event.set()
        await running
        assert sorted(wire.written) == ["a1", "a2", "b1", "b2", "c1", "c2"]

    asyncio.run(main())


def test_a_client_that_goes_takes_all_its_requests_along():
    async def main():
        wire, answers = Wire("a", "b", ends=False), Answers()
        running = asyncio.create_task(InferStream(wire, answers).run())
        await settled()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert sorted(answers.cancelled) == ["a", "b"]
        assert len(asyncio.all_tasks()) == 1  # this one

    asyncio.run(main())


def test_a_bug_ends_the_stream_instead_of_going_unheard():
    async def main():
        wire, answers = Wire("a", "bug", ends=False), Answers()
        running = asyncio.create_task(InferStream(wire, answers).run())
        await settled()
        answers.released["bug"].set()
        with pytest.raises(ZeroDivisionError):
            await running
        assert answers.cancelled == ["a"]

    asyncio.run(main())


def test_a_client_that_reads_nothing_ends_the_stream_and_gets_no_second_message():
    unheard: list[object] = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, told: unheard.append(told))
        wire = Unread(*"abcdef", ends=False)
        with pytest.raises(DeadlineExceeded, match="was read"):
            await InferStream(wire, Answers(), stall_s=0.01).run()
        assert len(asyncio.all_tasks()) == 1  # this one

    asyncio.run(main())
    gc.collect()  # a task whose error nobody heard says so now
    assert not unheard


def test_of_requests_that_fail_together_each_error_is_heard():
    unheard: list[object] = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, told: unheard.append(told))
        wire, answers = Wire("bug", "other", ends=False), Answers()

        async def both(request):
            async for response in answers(request):
                yield response
            raise ZeroDivisionError

        running = asyncio.create_task(InferStream(wire, both).run())
        await settled()
        for event in answers.released.values():
            event.set()
        with pytest.raises(ZeroDivisionError):
            await running

    asyncio.run(main())
    gc.collect()  # a task whose error nobody heard says so now
    assert not unheard
