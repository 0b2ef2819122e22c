"""The answers of one HTTP request: several generations submitted together, heard as one stream.

Leaving early, for whatever reason, cancels all of them. Knows no JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from remora_agent.runtime.bounds import check_prompt_scores
from remora_agent.serving.call import GenerateCall, PromptInput
from remora_agent.serving.driver import compiled
from remora_agent.serving.event_stream import EventStream
from remora_agent.serving.experiments import drawn
from remora_agent.serving.openai.naming import ModelChoice, select
from remora_agent.serving.router import Router
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.tool_calls import CallReading, ToolEvent, constrained
from remora_agent.text.pipeline import Encoded

T = TypeVar("T")
Answers = AsyncGenerator[tuple[int, ToolEvent], None]


@dataclass(frozen=True)
class Generation:
    """`events` with the number of the answer that each belongs to; `prompts` of each answer."""

    model: ServedModel
    prompts: tuple[Encoded, ...]
    events: Answers


class Generator:
    """`workers` run what takes as long as the caller's text is long."""

    def __init__(
        self,
        router: Router[ServedModel],
        workers: ThreadPoolExecutor,
        new_id: Callable[[], str],
    ) -> None:
        self.router = router
        self._workers = workers
        self._new_id = new_id

    async def work(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._workers, function)

    @asynccontextmanager
    async def generation(
        self,
        choice: ModelChoice,
        calls: Sequence[GenerateCall],
        *,
        eager: bool,
    ) -> AsyncIterator[Generation]:
        """All of `calls`, or none. Raises as ServedModel.encode and submit do, ModelUnknown."""
        lot = self._new_id()  # for all of them: they are answers to one request
        streams = [EventStream(asyncio.get_running_loop()) for _ in calls]
        ids = [self._new_id() for _ in calls]
        async with AsyncExitStack() as leaving:
            async with self.router.entering() as model:
                bundle, directory = model.runtime.bundle, model.runtime.adapters.directory
                selection = select(choice, bundle.source.name, directory)
                prompts = await self._encoded(model, [call.prompt for call in calls])
                tokens = [len(prompt.token_ids) for prompt in prompts]
                check_prompt_scores(calls[0].scoring.prompt_top, tokens)
                plan = model.tool_plan(calls[0])
                # All calls of a request share its constraint and its tools.
                grammar = await compiled(model, constrained(calls[0], plan).constraint)
                leaving.callback(_cancel, model, ids)
                for request_id, call, prompt, stream in zip(
                    ids, calls, prompts, streams, strict=True
                ):
                    chosen = drawn(replace(call, selection=selection), lot)
                    model.submit(request_id, chosen, prompt.token_ids, None, stream.put, grammar)
            each = [_read(s, CallReading(plan, self._new_id, eager=eager)) for s in streams]
            events = await leaving.enter_async_context(aclosing(_merged(each)))
            yield Generation(model, prompts, events)

    async def _encoded(
        self, model: ServedModel, prompts: Sequence[PromptInput]
    ) -> tuple[Encoded, ...]:
        """Equal prompts of a request are one object, and tokenised once."""
        known: dict[int, Encoded] = {}
        for prompt in prompts:
            if id(prompt) not in known:
                known[id(prompt)] = await self.work(lambda p=prompt: model.encode(p))  # type: ignore[misc]
        return tuple(known[id(prompt)] for prompt in prompts)


def _cancel(model: ServedModel, ids: Sequence[str]) -> None:
    """Without effect on those that have ended or never began."""
    for request_id in ids:
        model.runtime.cancel(request_id)


async def _read(stream: EventStream, reading: CallReading) -> AsyncGenerator[ToolEvent, None]:
    async with aclosing(stream.events()) as events:
        async for event in events:
            for shown in reading.events(event):
                yield shown


async def _merged(streams: Sequence[AsyncGenerator[ToolEvent, None]]) -> Answers:
    """At most one event of each is taken ahead: what nobody reads does not pile up here."""
    waiting = {asyncio.ensure_future(_next(s)): i for i, s in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                event, index = task.result(), waiting.pop(task)
                if event is not None:
                    yield index, event
                    waiting[asyncio.ensure_future(_next(streams[index]))] = index
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[ToolEvent, None]) -> ToolEvent | None:
    return await anext(stream, None)
