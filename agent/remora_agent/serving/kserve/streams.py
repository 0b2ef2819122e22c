"""One ModelStreamInfer call: many requests at a time, their responses interleaved on one stream.

Reads no further while `limit` requests are under way, writes one response at a time as fast as the
client reads, and takes all its requests along when the client goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc

from remora_protos.kserve.v2 import grpc_service_pb2 as pb

MAX_REQUESTS = 128  # of one stream at a time
Answer = Callable[[pb.ModelInferRequest], AsyncGenerator[pb.ModelStreamInferResponse, None]]


class InferStream:
    """`answer` gives a request's responses and raises only what ends the whole stream."""

    def __init__(self, context: Any, answer: Answer, limit: int = MAX_REQUESTS) -> None:
        self._context = context
        self._answer = answer
        self._limit = limit
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Until the client has sent its last request and all are answered."""
        reading: asyncio.Task[Any] | None = self._read()
        running: set[asyncio.Task[Any]] = set()
        try:
            while reading is not None or running:
                waited = set(running)
                if reading is not None and len(running) < self._limit:
                    waited.add(reading)
                done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                running -= done
                for task in done:
                    result = task.result()
                    if task is not reading:
                        continue
                    reading = None if result is grpc.aio.EOF else self._read()
                    if reading is not None:
                        running.add(asyncio.create_task(self._respond(result)))
        finally:
            await _ended([*running, *([] if reading is None else [reading])])

    def _read(self) -> asyncio.Task[Any]:
        async def read() -> Any:
            return await self._context.read()

        return asyncio.create_task(read())

    async def _respond(self, request: pb.ModelInferRequest) -> None:
        async with aclosing(self._answer(request)) as responses:
            async for response in responses:
                async with self._writing:
                    await self._context.write(response)


async def _ended(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
