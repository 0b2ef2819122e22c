"""remora.inference.v1.Inference: generation and tokenisation for the model that serves.

Owns the ids of the requests under way on this surface. A caller that goes away, cancels or runs
out of time takes its request with it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from remora_agent.runtime.api import Accepted, Delta, Finished
from remora_agent.serving import wire
from remora_agent.serving.call import GenerateCall
from remora_agent.serving.event_stream import EventStream, StreamEvent
from remora_agent.serving.router import Router
from remora_agent.serving.rpc_errors import translated
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.tool_calls import reading
from remora_agent.text.tool_reader import CallArguments, CallBegins
from remora_contract.errors import Conflict
from remora_protos.inference.v1 import inference_pb2 as pb
from remora_protos.inference.v1 import inference_pb2_grpc as rpc

Events = AsyncGenerator[StreamEvent, None]


def random_id() -> str:
    return uuid.uuid4().hex


class InferenceService(rpc.InferenceServicer):
    """`workers` run what takes as long as the caller's text is long."""

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

    @translated
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        call = wire.generate_call(request)
        async with aclosing(self._events(call, context.time_remaining())) as events:
            async for event in events:
                await context.write(wire.event(event))  # as fast as the caller reads

    @translated
    async def GenerateUnary(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        call = wire.generate_call(request)
        response, texts = pb.GenerateResponse(), []
        async with aclosing(self._events(call, context.time_remaining())) as events:
            async for event in events:
                if isinstance(event, Accepted):
                    response.request_id = event.request_id
                elif isinstance(event, Delta):
                    texts.append(event.text)
                    response.token_ids.extend(event.token_ids)
                elif isinstance(event, Finished):
                    response.finished.CopyFrom(wire.finished(event))
        response.text = "".join(texts)
        return response

    @translated
    async def Cancel(self, request: pb.CancelRequest, context: Any) -> pb.CancelResponse:
        wire.refuse_unknown_fields(request)
        model = self._running.get(request.request_id)
        found = model is not None and model.runtime.cancel(request.request_id)
        return pb.CancelResponse(found=found)

    @translated
    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        prompt = wire.tokenize_prompt(request)
        async with self._router.entering() as model:
            encoded = await self._work(model.encode, prompt)
        return pb.TokenizeResponse(token_ids=encoded.token_ids, rendered=encoded.text)

    @translated
    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Any
    ) -> pb.DetokenizeResponse:
        wire.refuse_unknown_fields(request)
        async with self._router.entering() as model:
            text = await self._work(
                lambda ids: model.runtime.text.decode(
                    ids, keep_special_tokens=request.keep_special_tokens
                ),
                list(request.token_ids),
            )
        return pb.DetokenizeResponse(text=text)

    async def _events(self, call: GenerateCall, timeout_s: float | None) -> Events:
        """Submits the call and yields its events; leaving early cancels it."""
        request_id = call.request_id or self._new_id()
        loop = asyncio.get_running_loop()
        started = loop.time()
        stream = EventStream(loop)
        async with self._router.entering() as model:
            encoded = await self._work(model.encode, call.prompt)
            if request_id in self._running:
                raise Conflict(f"a request with the id {request_id!r} is running; choose another")
            left = None if timeout_s is None else timeout_s - (loop.time() - started)
            plan = model.tool_plan(call)
            model.submit(request_id, call, encoded.token_ids, left, stream.put)
            self._running[request_id] = model
        try:
            async with aclosing(reading(stream.events(), plan, self._new_id)) as events:
                async for event in events:
                    if not isinstance(event, CallBegins | CallArguments):
                        yield event
        finally:
            del self._running[request_id]
            # Without effect on a request that has ended.
            model.runtime.cancel(request_id)

    async def _work(self, function: Callable[[Any], Any], argument: Any) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, function, argument)
