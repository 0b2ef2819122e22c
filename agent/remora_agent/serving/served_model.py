"""A runtime as the surfaces use it: a call becomes tokens, then a request whose names are settled.

Settling names (use case -> adapters -> digests) and switching a release's names exclude each
other, so a request sees the names of one release, never some of each. Knows no wire format.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from remora_agent.runtime.api import AdapterRef, Event, Failed, GenerationRequest, OnEvent
from remora_agent.runtime.embedding import Embedded, EmbeddingRequest, OnEmbedded
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.serving.call import (
    AdapterSelection,
    ChatPrompt,
    GenerateCall,
    PromptInput,
    TextPrompt,
    UseCaseRef,
)
from remora_agent.serving.chat_prompt import template_arguments, template_messages
from remora_agent.serving.embedding import EmbedCall, as_event, joined
from remora_agent.serving.tool_calls import ToolPlan, constrained, tool_plan
from remora_agent.serving.use_case_counts import UseCaseCounts
from remora_agent.telemetry.records import Origin, RequestRecords
from remora_agent.text.pipeline import Encoded
from remora_agent.text.tools import ToolFormat, detect
from remora_contract.errors import RequestInvalid


class ServedModel:
    """`observe` sees every event on the step thread, before the request's own listener; `counts`
    and `records` are those of the process (default: this model's own); `tool_format` is how it
    writes calls of tools (default: what its chat template says)."""

    def __init__(
        self,
        runtime: ModelRuntime,
        observe: Callable[[Event], None] | None = None,
        counts: UseCaseCounts | None = None,
        records: RequestRecords | None = None,
        tool_format: ToolFormat | None = None,
    ) -> None:
        self.runtime = runtime
        self.counts = counts or UseCaseCounts()
        self._records = records or RequestRecords()
        self._names = threading.Lock()
        self._observe = observe
        self.tool_format = tool_format or detect(runtime.text.tool_template)

    @contextmanager
    def changing_names(self) -> Iterator[None]:
        """No request settles its names meanwhile. Hold it for dictionary work only."""
        with self._names:
            yield

    def encode(self, prompt: PromptInput) -> Encoded:
        """Tokens of any input; takes as long as the text is long: for a worker thread.

        Raises RequestInvalid, Refused (a chat without a template).
        """
        text = self.runtime.text
        if isinstance(prompt, TextPrompt):
            return text.encode(prompt.text, add_special_tokens=prompt.add_special_tokens)
        if isinstance(prompt, ChatPrompt):
            return text.encode_chat(
                template_messages(prompt, self.tool_format),
                add_generation_prompt=prompt.add_generation_prompt,
                arguments=template_arguments(prompt, self.tool_format),
            )
        return Encoded("", prompt.ids)

    def tool_plan(self, call: GenerateCall) -> ToolPlan | None:
        """How to read calls of tools from the answer; None when none were offered. Raises
        Unsupported, RequestInvalid."""
        return tool_plan(call.prompt, self.tool_format)

    def submit(
        self,
        request_id: str,
        call: GenerateCall,
        tokens: tuple[int, ...],
        timeout_s: float | None,
        on_event: OnEvent,
    ) -> None:
        """Queues the call, its prompt being `tokens`. Does not wait for the engine.

        `timeout_s` from now until it must have ended. Raises as ModelRuntime.submit does, NotFound
        for a use case, RequestInvalid for a weight of an adapter that the use case has not.
        """
        plan = self.tool_plan(call)
        call = constrained(call, plan)
        runtime = self.runtime
        with self._names:
            request = GenerationRequest(
                request_id=request_id,
                prompt=tokens,
                adapters=self._adapters(call.selection),
                sampling=runtime.sampling(call.sampling),
                stopping=runtime.stopping(call.stopping),
                deadline_s=None if timeout_s is None else runtime.now() + timeout_s,
                scoring=call.scoring,
                share=call.share,
                visible_tokens=runtime.text.special_ids(plan.form.markers) if plan else (),
            )
            if isinstance(call.selection, UseCaseRef):
                on_event = self.counts.listening(call.selection.name, len(tokens), on_event)
            origin = self._origin(call, tokens)
            recorded = self._records.listening(request, origin, on_event)
            runtime.submit(request, self._listener(recorded))

    def embed(
        self,
        request_id: str,
        call: EmbedCall,
        prompts: Sequence[tuple[int, ...]],
        timeout_s: float | None,
        on_end: OnEmbedded,
    ) -> Callable[[], None]:
        """Queues the call, its inputs being `prompts`; returns what cancels it.

        `on_end` hears the end on the step thread. Raises as ModelRuntime.embed does, NotFound for
        a use case.
        """
        runtime = self.runtime
        with self._names:
            request = EmbeddingRequest(
                request_id,
                tuple(prompts),
                self._adapters(call.selection),
                call.pooling,
                call.normalize,
                None if timeout_s is None else runtime.now() + timeout_s,
                call.share,
            )
            told = self._told(request, call)

            def hear(end: Embedded | Failed) -> None:
                told(as_event(end))
                on_end(end)

            return runtime.embed(request, hear)

    def _told(self, request: EmbeddingRequest, call: EmbedCall) -> OnEvent:
        """Who hears of the end besides the caller: counts and records, as of any request."""
        prompt, use_case = joined(request.prompts), ""
        listener: OnEvent = _nobody
        if isinstance(call.selection, UseCaseRef):
            use_case = call.selection.name
            listener = self.counts.listening(use_case, len(prompt), listener)
        origin = Origin(self.runtime.bundle.source.name, use_case, call.trace_parent)
        whole = replace(request.reading(0), request_id=request.request_id, prompt=prompt)
        return self._listener(self._records.listening(whole, origin, listener))

    def _origin(self, call: GenerateCall, tokens: tuple[int, ...]) -> Origin:
        use_case = call.selection.name if isinstance(call.selection, UseCaseRef) else ""
        text = self.runtime.text.decode(list(tokens)) if self._records.texts else None
        return Origin(self.runtime.bundle.source.name, use_case, call.trace_parent, text)

    def _adapters(self, selection: AdapterSelection) -> tuple[AdapterRef, ...]:
        if not isinstance(selection, UseCaseRef):
            return selection
        use_case = self.runtime.adapters.directory.use_case(selection.name)
        weights = {a.name: a.weight for a in use_case.adapters}
        for given in selection.weights:
            if given.name not in weights:
                has = ", ".join(weights) or "no adapter"
                raise RequestInvalid(
                    f"use_case_weights: use case {use_case.name} has {has}, not {given.name}"
                )
            weights[given.name] = given.weight
        return tuple(AdapterRef(name, None, weight) for name, weight in weights.items())

    def _listener(self, on_event: OnEvent) -> OnEvent:
        observe = self._observe
        if observe is None:
            return on_event

        def listen(event: Event) -> None:
            observe(event)
            on_event(event)

        return listen


def _nobody(event: Event) -> None:
    """The caller hears of the end by other ways."""
