"""Runs calls of any surface on the model that serves, and owns their ids meanwhile.

A reader that leaves its events early takes the request with it. Knows no wire format.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from remora_agent.runtime.api import Failed
from remora_agent.runtime.embedding import Embedded
from remora_agent.serving.call import GenerateCall
from remora_agent.serving.embedding import EmbedCall
from remora_agent.serving.event_stream import EventStream, StreamEvent
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.tool_calls import CallReading
from remora_agent.text.tool_reader import CallArguments, CallBegins
from remora_contract.errors import Conflict

Events = AsyncGenerator[StreamEvent, None]
# What a call becomes for the model that it has entered; quick, on the event loop.
Settle = Callable[[ServedModel, GenerateCall], GenerateCall]
SettleEmbed = Callable[[ServedModel, EmbedCall], EmbedCall]


def random_id() -> str:
    return uuid.uuid4().hex


def as_it_is(model: ServedModel, call: GenerateCall) -> GenerateCall:
    return call


class RequestDriver:
    """`workers` run what takes as long as the caller's text is long. One event loop's."""

    def __init__(
        self,
        router: Router[ServedModel],
        workers: ThreadPoolExecutor,
        new_id: Callable[[], str] = random_id,
    ) -> None:
        self._router = router
        self._workers = workers
        self._new_id = new_id
        self._running: dict[str, ServedModel] = {}

    async def events(
        self, call: GenerateCall, timeout_s: float | None, settle: Settle = as_it_is
    ) -> Events:
        """Submits the call and yields its events, calls of tools taken out of the text;
        leaving early cancels it.

        `timeout_s` from now until it must have ended. Raises what `settle`, the router and
        ServedModel.submit raise, Conflict for an id in use, and the error of a Failed.
        """
        request_id = call.request_id or self._new_id()
        loop = asyncio.get_running_loop()
        started = loop.time()
        stream = EventStream(loop)
        async with self._router.entering() as model:
            call = settle(model, call)
            encoded = await self.work(model.encode, call.prompt)
            if request_id in self._running:
                raise Conflict(f"a request with the id {request_id!r} is running; choose another")
            left = None if timeout_s is None else timeout_s - (loop.time() - started)
            reading = CallReading(model.tool_plan(call), self._new_id)
            model.submit(request_id, call, encoded.token_ids, left, stream.put)
            self._running[request_id] = model
        try:
            async with aclosing(stream.events()) as events:
                async for event in events:
                    for shown in reading.events(event):
                        if not isinstance(shown, CallBegins | CallArguments):
                            yield shown
        finally:
            del self._running[request_id]
            # Without effect on a request that has ended.
            model.runtime.cancel(request_id)

    async def embed(
        self, call: EmbedCall, timeout_s: float | None, settle: SettleEmbed | None = None
    ) -> Embedded:
        """The vectors of the call's inputs; leaving early cancels it.

        Raises what `settle`, the router and ServedModel.embed raise, and the error of its end.
        """
        loop = asyncio.get_running_loop()
        started = loop.time()
        ended: asyncio.Future[Embedded | Failed] = loop.create_future()
        async with self._router.entering() as model:
            if settle is not None:
                call = settle(model, call)
            prompts = await self.work(
                lambda inputs: [model.encode(i).token_ids for i in inputs], call.inputs
            )
            left = None if timeout_s is None else timeout_s - (loop.time() - started)
            cancel = model.embed(self._new_id(), call, prompts, left, _into(ended, loop))
        try:
            end = await ended
        finally:
            cancel()  # without effect on one that has ended
        if isinstance(end, Failed):
            raise end.error
        return end

    def cancel(self, request_id: str) -> bool:
        """Whether it was running here."""
        model = self._running.get(request_id)
        return model is not None and model.runtime.cancel(request_id)

    async def work(self, function: Callable[[Any], Any], argument: Any) -> Any:
        """`function(argument)` on a worker thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, function, argument)


def _into(
    ended: asyncio.Future[Embedded | Failed], loop: asyncio.AbstractEventLoop
) -> Callable[[Embedded | Failed], None]:
    """What brings the end from the step thread to a future of `loop`."""

    def settle(end: Embedded | Failed) -> None:
        if not ended.done():
            ended.set_result(end)

    def hear(end: Embedded | Failed) -> None:
        try:
            loop.call_soon_threadsafe(settle, end)
        except RuntimeError:
            # The loop has closed: nobody waits any more, and the step thread must not fail.
            return

    return hear
