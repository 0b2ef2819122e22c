"""POST /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from remora_agent.serving.call import GenerateCall
from remora_agent.serving.callers import TRACE_PARENT
from remora_agent.serving.limits import check_session
from remora_agent.serving.openai.body import json_object
from remora_agent.serving.openai.chat_reply import ChatChunks, ChatResponse, Reply
from remora_agent.serving.openai.chat_request import ChatRequest, chat_request
from remora_agent.serving.openai.completion_reply import (
    CompletionChunks,
    CompletionParts,
    CompletionResponse,
)
from remora_agent.serving.openai.completion_request import CompletionRequest, completion_request
from remora_agent.serving.openai.errors import FieldInvalid
from remora_agent.serving.openai.exchange import (
    Chunks,
    ServerSentEvents,
    attended,
    read_body,
    share_of_caller,
)
from remora_agent.serving.openai.generating import Generation, Generator
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.tool_calls import ToolEvent
from remora_agent.text.pipeline import Encoded

SESSION = "x-session-id"
Wanted = ChatRequest | CompletionRequest
Answering = AbstractAsyncContextManager[Generation]


class _Streamed(Protocol):
    def chunks(self, index: int, event: ToolEvent) -> list[dict[str, Any]]: ...

    def last(self) -> list[dict[str, Any]]: ...


class _Whole(Protocol):
    def add(self, index: int, event: ToolEvent) -> None: ...

    def response(self) -> dict[str, Any]: ...


class Completions:
    """`unix_now` dates replies, in seconds."""

    def __init__(
        self,
        generator: Generator,
        new_id: Callable[[], str],
        unix_now: Callable[[], float],
    ) -> None:
        self._generator, self._new_id, self._unix_now = generator, new_id, unix_now

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, f"chatcmpl-{self._new_id()}", chat_request)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, f"cmpl-{self._new_id()}", completion_request)

    async def _answer(
        self,
        request: Request,
        reply_id: str,
        read: Callable[[Mapping[str, Any]], Wanted],
    ) -> Response:
        body = await read_body(request)
        wanted = await self._generator.work(lambda: read(json_object(body)))
        generation = self._generator.generation(
            wanted.options.choice,
            [as_called(call, request) for call in wanted.calls],
            eager=wanted.options.stream,
        )
        if wanted.options.stream:
            return ServerSentEvents(self._chunks(wanted, reply_id, generation), reply_id)
        whole = await attended(request.receive, self._whole(wanted, reply_id, generation))
        return JSONResponse(whole, headers={"x-request-id": reply_id})

    async def _chunks(self, wanted: Wanted, reply_id: str, answering: Answering) -> Chunks:
        async with answering as generation:
            made = _streamed(wanted, self._reply(wanted, reply_id, generation), generation)
            async for index, event in generation.events:
                for chunk in made.chunks(index, event):
                    yield chunk
            for chunk in made.last():
                yield chunk

    async def _whole(self, wanted: Wanted, reply_id: str, answering: Answering) -> dict[str, Any]:
        async with answering as generation:
            made = _whole(wanted, self._reply(wanted, reply_id, generation), generation)
            async for index, event in generation.events:
                made.add(index, event)
            return made.response()

    def _reply(self, wanted: Wanted, reply_id: str, generation: Generation) -> Reply:
        return Reply(
            reply_id,
            int(self._unix_now()),
            wanted.options.choice.model,
            wanted.options.n,
            wanted.calls[0].scoring.top is not None,
            generation.model.runtime.text.bytes_of_token,
            generation.model.runtime.text.is_special,
        )


def as_called(call: GenerateCall, request: Request) -> GenerateCall:
    """The call in its caller's trace, share and session. Raises FieldInvalid for two sessions,
    RequestInvalid for one that is too long."""
    trace = request.headers.get(TRACE_PARENT, "")
    session = request.headers.get(SESSION, "")
    if session and call.session not in ("", session):
        raise FieldInvalid(f"session: the header {SESSION} says another; give one", "session")
    return replace(
        call,
        trace_parent=trace,
        share=share_of_caller(call.share, request),
        session=check_session(session or call.session),
    )


def _streamed(wanted: Wanted, reply: Reply, generation: Generation) -> _Streamed:
    if isinstance(wanted, ChatRequest):
        return ChatChunks(reply, wanted.options.include_usage)
    parts = _parts(wanted, reply, generation)
    return CompletionChunks(reply, parts, wanted.options.include_usage)


def _whole(wanted: Wanted, reply: Reply, generation: Generation) -> _Whole:
    answers = len(wanted.calls)
    if isinstance(wanted, ChatRequest):
        return ChatResponse(reply, answers)
    return CompletionResponse(reply, _parts(wanted, reply, generation), answers)


def _parts(wanted: CompletionRequest, reply: Reply, generation: Generation) -> CompletionParts:
    echo = [_with_text(p, generation.model) for p in generation.prompts] if wanted.echo else ()
    return CompletionParts(reply, wanted.calls[0].scoring.top or 0, echo, len(wanted.calls))


def _with_text(prompt: Encoded, model: ServedModel) -> Encoded:
    """A prompt given as tokens has the text that they stand for."""
    if prompt.text:
        return prompt
    text = model.runtime.text.decode(prompt.token_ids, keep_special_tokens=True)
    return replace(prompt, text=text)
