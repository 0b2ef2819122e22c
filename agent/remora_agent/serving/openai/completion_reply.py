"""Answers to plain prompts as OpenAI's objects: one response, or chunks of a stream. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from remora_agent.runtime.api import Accepted, Delta, Finished, PromptScored, Provenance
from remora_agent.serving.openai import usage
from remora_agent.serving.openai.chat_reply import Reply
from remora_agent.serving.openai.logprobs import CompletionLogprobs, joined
from remora_agent.serving.tool_calls import ToolEvent
from remora_agent.text.pipeline import Encoded
from remora_contract.errors import InternalFault

_KIND = "text_completion"


class CompletionParts:
    """Events in, parts of choices out: a stream's chunks, or what a response is joined from.

    `echo` are the prompts, text and tokens, that each answer begins with.
    """

    def __init__(self, reply: Reply, top: int, echo: Sequence[Encoded], answers: int) -> None:
        self._reply, self._echo = reply, echo
        self._logprobs = [
            CompletionLogprobs(reply.token_bytes, reply.is_special, top) for _ in range(answers)
        ]
        self.origin: Provenance | None = None

    def parts(self, index: int, event: ToolEvent) -> list[dict[str, Any]]:
        """Raises Unavailable when the request was cancelled on the device."""
        scored = self._reply.scored
        if isinstance(event, Accepted):
            self.origin = event.provenance
            # With logprobs the prompt comes with its own, a moment later.
            return [self._part(index, self._echo[index].text)] if self._echo and not scored else []
        if isinstance(event, PromptScored) and self._echo:
            echo = self._echo[index]
            logprobs = self._logprobs[index].prompt(echo.token_ids, event.logprobs, echo.text)
            return [self._part(index, echo.text, logprobs)]
        if isinstance(event, Delta):
            if not event.text and not event.logprobs:
                return []
            part = self._logprobs[index].part(event.logprobs) if scored else None
            return [self._part(index, event.text, part)]
        if isinstance(event, Finished):
            self._reply.ended[index] = event
            return [self._part(index, "", reason=usage.finish_reason(event))]
        return []

    @staticmethod
    def _part(
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class CompletionChunks:
    def __init__(self, reply: Reply, parts: CompletionParts, include_usage: bool) -> None:
        self._reply, self._parts, self._include_usage = reply, parts, include_usage

    def chunks(self, index: int, event: ToolEvent) -> list[dict[str, Any]]:
        made = self._parts.parts(index, event)
        last = {"usage": None} if self._include_usage else {}
        return [{**self._head(), "choices": [part], **last} for part in made]

    def last(self) -> list[dict[str, Any]]:
        if not self._include_usage:
            return []
        return [{**self._head(), "choices": [], "usage": self._reply.usage()}]

    def _head(self) -> dict[str, Any]:
        return self._reply.head(_KIND, self._parts.origin)


class CompletionResponse:
    def __init__(self, reply: Reply, parts: CompletionParts, answers: int) -> None:
        self._reply, self._parts = reply, parts
        self._made: list[list[dict[str, Any]]] = [[] for _ in range(answers)]

    def add(self, index: int, event: ToolEvent) -> None:
        self._made[index] += self._parts.parts(index, event)

    def response(self) -> dict[str, Any]:
        if len(self._reply.ended) < len(self._made):
            raise InternalFault("an answer has no end; this is a bug, report it")
        return {
            **self._reply.head(_KIND, self._parts.origin),
            "choices": [_whole(i, parts) for i, parts in enumerate(self._made)],
            "usage": self._reply.usage(),
        }


def _whole(index: int, parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scored = [p["logprobs"] for p in parts if p["logprobs"] is not None]
    return {
        "index": index,
        "text": "".join(p["text"] for p in parts),
        "logprobs": joined(scored) if scored else None,
        "finish_reason": parts[-1]["finish_reason"],
    }
