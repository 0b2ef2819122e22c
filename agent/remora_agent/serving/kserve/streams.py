"""One ModelStreamInfer call: many requests at a time, their responses interleaved on one stream.

Reads no further while `limit` requests are under way, writes one response at a time as fast as the
client reads, and takes all its requests along when the client goes or reads nothing any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from remora_agent.serving.legible import legible
from remora_agent.serving.writing import STALL_S, write
from remora_contract.errors import DeadlineExceeded
from remora_protos.kserve.v2 import grpc_service_pb2 as pb

MAX_REQUESTS = 128  # of one stream at a time
Answer = Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelStreamInferResponse, None]]


class InferStream:
    """`answer` gives a request's responses and raises only what ends the whole stream."""

    def __init__(
        self,
        context: Any,
        answer: Answer,
        limit: int = MAX_REQUESTS,
        stall_s: float = STALL_S,
    ) -> None:
        self._context = context
        self._answer = answer
        self._limit = limit
        self._stall_s = stall_s
        self._writing = asyncio.Lock()
        self._stalled: DeadlineExceeded | None = None

    async def run(self) -> None:
        """Until the client has sent its last request and all are answered. Raises DeadlineExceeded
        when it reads nothing for `stall_s`, RequestInvalid for bytes that are no request."""
        reading: asyncio.Task[Any] | None = self._read()
        running: set[asyncio.Task[Any]] = set()
        try:
            while reading is not None or running:
                waited = set(running)
                if reading is not None and len(running) < self._limit:
                    waited.add(reading)
                done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    result = task.result()
                    if task is not reading:
                        continue
                    reading = None if result is grpc.aio.EOF else self._read()
                    if reading is not None:
                        running.add(asyncio.create_task(self._respond(result)))
                running -= done  # only now: of several that failed, each is heard
        finally:
            await _ended([*running, *([] if reading is None else [reading])])

    def _read(self) -> asyncio.Task[Any]:
        async def read() -> Any:
            return legible(await self._context.read())

        return asyncio.create_task(read())

    async def _respond(self, request: pb.ModelInferRequest) -> None:
        async with aclosing(self._answer(request)) as responses:
            async for response in responses:
                async with self._writing:
                    await self._write(response)

    async def _write(self, response: pb.ModelStreamInferResponse) -> None:
        if self._stalled is not None:
            raise self._stalled  # gRPC still has the message that nobody takes, and no room
        try:
            await write(self._context, response, self._stall_s)
        except DeadlineExceeded as e:
            self._stalled = e
            raise


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
