"""Runs calls of any surface on the model that serves, and owns their ids meanwhile.

A reader that leaves its events early takes the request with it. Knows no wire format.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from remora_agent.runtime.api import Constraint, Failed
from remora_agent.runtime.constraint import COMPILE_TIMEOUT_S, Grammar
from remora_agent.runtime.embedding import Embedded
from remora_agent.serving.call import GenerateCall
from remora_agent.serving.choices import Showing, choice_ids
from remora_agent.serving.embedding import EmbedCall
from remora_agent.serving.event_stream import EventStream, StreamEvent
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.tool_calls import CallReading, constrained
from remora_agent.text.tool_reader import CallArguments, CallBegins
from remora_contract.errors import Conflict, Exhausted, RequestInvalid, Unsupported

Events = AsyncGenerator[StreamEvent, None]
# Which of the call's answers, and what it says.
Answers = AsyncGenerator[tuple[int, StreamEvent], None]
# What a call becomes for the model that it has entered; quick, on the event loop.
Settle = Callable[[ServedModel, GenerateCall], GenerateCall]
SettleEmbed = Callable[[ServedModel, EmbedCall], EmbedCall]


def random_id() -> str:
    return uuid.uuid4().hex


def as_it_is(model: ServedModel, call: GenerateCall) -> GenerateCall:
    return call


@dataclass(frozen=True)
class _Running:
    model: ServedModel
    ids: tuple[str, ...]

    def cancel(self) -> bool:
        found = [self.model.runtime.cancel(request_id) for request_id in self.ids]
        return any(found)


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
        self._running: dict[str, _Running] = {}

    async def events(
        self, call: GenerateCall, timeout_s: float | None, settle: Settle = as_it_is
    ) -> Events:
        """As `answers`, for a surface whose calls have one. Raises Unsupported when `call.n` says
        more."""
        if call.n != 1:
            raise Unsupported("n: this interface gives one answer to a request; leave it out")
        async with aclosing(self.answers(call, timeout_s, settle)) as answers:
            async for _, event in answers:
                yield event

    async def answers(
        self, call: GenerateCall, timeout_s: float | None, settle: Settle = as_it_is
    ) -> Answers:
        """Submits the call, all of its `n` answers or none, and yields what they say; leaving early
        cancels them. Calls of tools are taken out of the text; Finished has them.

        `timeout_s` from now until they must have ended. Raises what `settle`, the router,
        ServedModel.submit_choices and ModelRuntime.compile raise, Conflict for an id in use, and
        the error of a Failed.
        """
        request_id = call.request_id or self._new_id()
        loop = asyncio.get_running_loop()
        started = loop.time()
        async with self._router.entering() as model:
            call = settle(model, call)
            encoded = await self.work(model.encode, call.prompt)
            prompt_text = await self.work(model.prompt_text, encoded) if call.echo else None
            plan = model.tool_plan(call)
            grammar = await compiled(model, constrained(call, plan).constraint)
            if request_id in self._running:
                raise Conflict(f"a request with the id {request_id!r} is running; choose another")
            left = None if timeout_s is None else timeout_s - (loop.time() - started)
            running = _Running(model, choice_ids(request_id, call.n))
            stream = EventStream(loop, call.n)
            hear = stream.listeners()
            model.submit_choices(running.ids, call, encoded.token_ids, left, hear, grammar)
            self._running[request_id] = running
        showing = Showing(request_id, prompt_text)
        readings = [CallReading(plan, self._new_id) for _ in range(call.n)]
        try:
            async with aclosing(stream.choice_events()) as events:
                async for choice, event in events:
                    for read in readings[choice].events(event):
                        if isinstance(read, CallBegins | CallArguments):
                            continue  # Finished has them
                        for shown in showing(choice, read):
                            yield choice, shown
        finally:
            del self._running[request_id]
            running.cancel()  # without effect on what has ended

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
        """Whether it was running here; all its answers end."""
        running = self._running.get(request_id)
        return running is not None and running.cancel()

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


async def compiled(model: ServedModel, constraint: Constraint | None) -> Grammar | None:
    """Raises as ModelRuntime.compile, RequestInvalid when it takes too long, Exhausted when others
    take so long that it did not begin."""
    if constraint is None:
        return None
    compiling = model.runtime.compile(constraint)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(compiling), COMPILE_TIMEOUT_S)
    except asyncio.TimeoutError as e:
        if compiling.cancel():  # it had not begun
            raise Exhausted(
                f"constraint: it waited {COMPILE_TIMEOUT_S:g} s behind others to be compiled",
                retry_after_s=COMPILE_TIMEOUT_S,
            ) from e
        raise RequestInvalid(
            f"constraint: compiling it takes longer than {COMPILE_TIMEOUT_S:g} s; make it simpler"
        ) from e
