"""Answers to a chat as OpenAI's objects: one response, or chunks of a stream. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from remora_agent.runtime.api import Accepted, Delta, Finished, Provenance, TokenLogprob
from remora_agent.serving.openai import usage
from remora_agent.serving.openai.logprobs import IsSpecial, TokenBytes, chat_logprobs
from remora_agent.serving.tool_calls import ToolEvent
from remora_agent.text.tool_reader import CallArguments, CallBegins
from remora_contract.errors import InternalFault


@dataclass(frozen=True)
class Reply:
    """What all parts of one reply say."""

    id: str
    created: int  # Unix seconds
    model: str  # as the request named it
    n: int  # answers for each prompt
    scored: bool  # logprobs are wanted
    token_bytes: TokenBytes
    is_special: IsSpecial  # answers do not show its text
    ended: dict[int, Finished] = field(default_factory=dict)

    def usage(self) -> dict[str, Any]:
        return usage.usage([self.ended[i] for i in sorted(self.ended)], self.n)

    def head(self, kind: str, origin: Provenance | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            **usage.origin(origin),
        }


class ChatChunks:
    """Events in, chunks out. `include_usage`: each has the field, the last one its value."""

    def __init__(self, reply: Reply, include_usage: bool) -> None:
        self._reply, self._include_usage = reply, include_usage
        self._origin: Provenance | None = None

    def chunks(self, index: int, event: ToolEvent) -> list[dict[str, Any]]:
        """Raises Unavailable when the request was cancelled on the device."""
        if isinstance(event, Accepted):
            self._origin = event.provenance
            return [self._chunk(index, {"role": "assistant", "content": ""})]
        if isinstance(event, Delta):
            if not event.text and not event.logprobs:
                return []
            return [self._chunk(index, {"content": event.text}, event.logprobs)]
        if isinstance(event, CallBegins):
            function = {"name": event.name, "arguments": ""}
            call = {"index": event.index, "id": event.id, "type": "function", "function": function}
            return [self._chunk(index, {"tool_calls": [call]})]
        if isinstance(event, CallArguments):
            part = {"index": event.index, "function": {"arguments": event.text}}
            return [self._chunk(index, {"tool_calls": [part]})]
        if isinstance(event, Finished):
            self._reply.ended[index] = event
            return [self._chunk(index, {}, reason=usage.finish_reason(event))]
        return []

    def last(self) -> list[dict[str, Any]]:
        if not self._include_usage:
            return []
        head = self._reply.head("chat.completion.chunk", self._origin)
        return [{**head, "choices": [], "usage": self._reply.usage()}]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        scored: Sequence[TokenLogprob] = (),
        reason: str | None = None,
    ) -> dict[str, Any]:
        logprobs = chat_logprobs(scored, self._reply.token_bytes) if scored else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        head = self._reply.head("chat.completion.chunk", self._origin)
        last = {"usage": None} if self._include_usage else {}
        return {**head, "choices": [choice], **last}


class ChatResponse:
    """Events in, one response at the end."""

    def __init__(self, reply: Reply, answers: int) -> None:
        self._reply = reply
        self._texts: list[list[str]] = [[] for _ in range(answers)]
        self._scored: list[list[TokenLogprob]] = [[] for _ in range(answers)]
        self._origin: Provenance | None = None

    def add(self, index: int, event: ToolEvent) -> None:
        if isinstance(event, Accepted):
            self._origin = event.provenance
        elif isinstance(event, Delta):
            self._texts[index].append(event.text)
            self._scored[index].extend(event.logprobs)
        elif isinstance(event, Finished):
            self._reply.ended[index] = event

    def response(self) -> dict[str, Any]:
        """Raises Unavailable when the request was cancelled on the device."""
        if len(self._reply.ended) < len(self._texts):
            raise InternalFault("an answer has no end; this is a bug, report it")
        return {
            **self._reply.head("chat.completion", self._origin),
            "choices": [self._choice(i) for i in range(len(self._texts))],
            "usage": self._reply.usage(),
        }

    def _choice(self, index: int) -> dict[str, Any]:
        ended, text = self._reply.ended[index], "".join(self._texts[index])
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if ended.tool_calls:
            message["content"] = text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments_json},
                }
                for call in ended.tool_calls
            ]
        scored = self._reply.scored
        return {
            "index": index,
            "message": message,
            "logprobs": (
                chat_logprobs(self._scored[index], self._reply.token_bytes) if scored else None
            ),
            "finish_reason": usage.finish_reason(ended),
        }
