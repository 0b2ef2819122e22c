"""A runtime as the surfaces use it: a call becomes tokens, then a request whose names are settled.

Settling names (use case -> adapters -> digests) and switching a release's names exclude each
other, so a request sees the names of one release, never some of each. Knows no wire format.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from remora_agent.runtime.api import (
    AdapterRef,
    Event,
    Failed,
    GenerationRequest,
    OnEvent,
    Provenance,
)
from remora_agent.runtime.bounds import check_prompt_scores
from remora_agent.runtime.constraint import COMPILE_TIMEOUT_S, Grammar
from remora_agent.runtime.embedding import Embedded, EmbeddingRequest, OnEmbedded
from remora_agent.runtime.model import Model
from remora_agent.runtime.step_loop import wait_for
from remora_agent.serving.call import (
    AdapterSelection,
    ChatPrompt,
    GenerateCall,
    PromptInput,
    TextPrompt,
    UseCaseRef,
)
from remora_agent.serving.chat_prompt import template_arguments, template_messages
from remora_agent.serving.choices import choice_call
from remora_agent.serving.embedding import EmbedCall, as_event, joined
from remora_agent.serving.experiment_counts import ExperimentCounts
from remora_agent.serving.experiments import Assigned, assigned, drawn, refuse_embedding
from remora_agent.serving.held_calls import HeldCall, HeldCalls
from remora_agent.serving.shadow import ShadowRunner
from remora_agent.serving.strict_tools import SpecialTokens
from remora_agent.serving.tool_calls import ToolPlan, constrained, tool_plan
from remora_agent.serving.use_case_counts import UseCaseCounts
from remora_agent.serving.waiting_calls import AcceptedOnce, WaitingCalls
from remora_agent.telemetry.records import Origin, RequestRecords
from remora_agent.text.pipeline import Encoded, TextPipeline
from remora_agent.text.tools import ToolFormat, detect
from remora_contract.errors import RequestInvalid


class ServedModel:
    """`observe` sees every event on the step thread, before the request's own listener; `counts`,
    `experiments` and `records` are those of the process (default: this model's own); `tool_format`
    is how it writes calls of tools (default: what its chat template says); `draw` stands for the
    session of a call without one."""

    def __init__(
        self,
        runtime: Model,
        observe: Callable[[Event], None] | None = None,
        counts: UseCaseCounts | None = None,
        records: RequestRecords | None = None,
        tool_format: ToolFormat | None = None,
        experiments: ExperimentCounts | None = None,
        draw: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self.runtime = runtime
        self.counts = counts or UseCaseCounts()
        self._experiments = experiments or ExperimentCounts()
        self._draw = draw
        self._records = records or RequestRecords()
        self._names = threading.Lock()
        self._observe = observe
        self.tool_format = tool_format or detect(runtime.text.tool_template)
        self._special = _special_tokens(runtime.text, self.tool_format)
        self._waiting = WaitingCalls()
        self._shadow = ShadowRunner(runtime, self._experiments, self._adapters)

    @contextmanager
    def changing_names(self) -> Iterator[None]:
        """No request settles its names meanwhile. Hold it for dictionary work only. What shadows
        compute of the old names ends."""
        with self._names:
            yield
        self.runtime.end_spare()

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
        return tool_plan(call.prompt, self.tool_format, self._special)

    def prompt_text(self, encoded: Encoded) -> str:
        """What was tokenised; of a prompt given as tokens, what they stand for."""
        if encoded.text:
            return encoded.text
        return self.runtime.text.decode(encoded.token_ids, keep_special_tokens=True)

    def submit(
        self,
        request_id: str,
        call: GenerateCall,
        tokens: tuple[int, ...],
        timeout_s: float | None,
        on_event: OnEvent,
        grammar: Grammar | None = None,
    ) -> None:
        """`submit_choices` for one answer. A constraint whose grammar is not given is compiled here
        and waited for: not on an event loop then."""
        grammar = grammar or self.grammar(call)
        self.submit_choices((request_id,), call, tokens, timeout_s, (on_event,), grammar)

    def grammar(self, call: GenerateCall) -> Grammar | None:
        """Of its constraint and its tools, waited for. Raises as ModelRuntime.compile, Unavailable
        when it takes too long."""
        constraint = constrained(call, self.tool_plan(call)).constraint
        if constraint is None:
            return None
        return wait_for(self.runtime.compile(constraint), COMPILE_TIMEOUT_S)

    def submit_choices(
        self,
        request_ids: Sequence[str],
        call: GenerateCall,
        tokens: tuple[int, ...],
        timeout_s: float | None,
        on_events: Sequence[OnEvent],
        grammar: Grammar | None = None,
    ) -> None:
        """Queues an answer to the call for each id, all or none; the i-th has seed + i, the first
        tells the prompt's scores. The prompt is `tokens`, `grammar` the compiled constraint (the
        tools' too). Does not wait for the engine.

        `timeout_s` from now until they must have ended. Raises as ModelRuntime.submit does,
        NotFound for a use case, RequestInvalid for a weight of an adapter that it has not.
        """
        check_prompt_scores(call.scoring.prompt_top, [len(tokens)] * len(request_ids))
        deadline_s = None if timeout_s is None else self.runtime.now() + timeout_s
        call = drawn(call, self._draw())
        with self._names, ExitStack() as adding:
            arm = assigned(call, self.runtime.adapters.directory)
            pairs = []
            for i, (request_id, on_event) in enumerate(zip(request_ids, on_events, strict=True)):
                one = choice_call(call, i)
                is_shadowed = i == 0 and self._shadow.wants(arm, request_id)
                one = self._shadow.seeded(one) if is_shadowed else one
                request = self._request(request_id, one, tokens, deadline_s, arm)
                listener = self._told(one, request, AcceptedOnce(on_event))
                if arm is not None:
                    listener = self._experiments.listening(arm.is_keyed, listener)
                    if is_shadowed:
                        listener = self._shadow.listening(arm, request, grammar, listener)
                pairs.append(self._adding(adding, one, request, listener))
            self.runtime.submit_all(pairs, grammar)

    def resume(
        self,
        held: HeldCall,
        tokens: tuple[int, ...],
        timeout_s: float | None,
        grammar: Grammar | None,
    ) -> None:
        """Takes over a call that another model gave up; counts and records go on with it. Raises
        as `submit_choices`."""
        deadline_s = None if timeout_s is None else self.runtime.now() + timeout_s
        with self._names, ExitStack() as adding:
            arm = assigned(held.call, self.runtime.adapters.directory)
            request = self._request(held.request_id, held.call, tokens, deadline_s, arm)
            pair = self._adding(adding, held.call, request, held.on_event)
            self.runtime.submit_all([pair], grammar)

    def _adding(
        self, adding: ExitStack, call: GenerateCall, request: GenerationRequest, listener: OnEvent
    ) -> tuple[GenerationRequest, OnEvent]:
        """The request among those that may move until it has begun."""
        prompt_tokens, deadline_s = len(request.prompt), request.deadline_s
        held = HeldCall(request.request_id, call, prompt_tokens, deadline_s, listener, self._was)
        adding.enter_context(self._waiting.adding(held))
        return request, self._waiting.watching(held, self._observed(listener))

    def _request(
        self,
        request_id: str,
        call: GenerateCall,
        tokens: tuple[int, ...],
        deadline_s: float | None,
        arm: Assigned | None,
    ) -> GenerationRequest:
        plan, runtime = self.tool_plan(call), self.runtime
        call = constrained(call, plan)
        return GenerationRequest(
            request_id=request_id,
            prompt=tokens,
            adapters=self._adapters(call.selection if arm is None else arm.selection),
            sampling=runtime.sampling(call.sampling),
            stopping=runtime.stopping(call.stopping),
            deadline_s=deadline_s,
            constraint=call.constraint,
            scoring=call.scoring,
            share=call.share,
            arm=None if arm is None else arm.served,
            visible_tokens=runtime.text.special_ids(plan.form.markers) if plan else (),
        )

    def cancel(self, request_id: str) -> bool:
        """See ModelRuntime.cancel."""
        return self.runtime.cancel(request_id)

    def give_up_waiting(self, observe: OnEvent | None = None) -> HeldCalls:
        """The calls that have no row yet leave this model, to be handed to the next. Nobody may
        submit meanwhile. `observe` hears the end of those that end on the way."""
        return self._waiting.give_up(self.runtime.withdraw, observe)

    @property
    def _was(self) -> Provenance:
        status = self.runtime.status()
        return Provenance(status.bundle_digest, status.engine_digest)

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
            refuse_embedding(call.selection, runtime.adapters.directory)
            request = EmbeddingRequest(
                request_id,
                tuple(prompts),
                self._adapters(call.selection),
                call.pooling,
                call.normalize,
                None if timeout_s is None else runtime.now() + timeout_s,
                call.share,
            )
            prompt = joined(request.prompts)
            whole = replace(request.reading(0), request_id=request_id, prompt=prompt)
            # Counts and records hear of it as of any request.
            told = self._observed(self._told(call, whole, _nobody))

            def hear(end: Embedded | Failed) -> None:
                told(as_event(end))
                on_end(end)

            return runtime.embed(request, hear)

    def _origin(self, call: GenerateCall | EmbedCall, tokens: tuple[int, ...]) -> Origin:
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

    def _told(
        self, call: GenerateCall | EmbedCall, request: GenerationRequest, on_event: OnEvent
    ) -> OnEvent:
        """`on_event` behind the process's counts and records; they hear of a call once, whatever
        models it moves through."""
        if isinstance(call.selection, UseCaseRef):
            on_event = self.counts.listening(call.selection.name, len(request.prompt), on_event)
        return self._records.listening(request, self._origin(call, request.prompt), on_event)

    def _observed(self, on_event: OnEvent) -> OnEvent:
        observe = self._observe
        if observe is None:
            return on_event

        def listen(event: Event) -> None:
            observe(event)
            on_event(event)

        return listen


def _nobody(event: Event) -> None:
    """The caller hears of the end by other ways."""


def _special_tokens(text: TextPipeline, form: ToolFormat | None) -> SpecialTokens:
    ids = {m: i for m in (form.markers if form else ()) for i in text.special_ids([m])}
    return SpecialTokens(ids, sorted(set(text.all_special_ids) - set(ids.values())))
