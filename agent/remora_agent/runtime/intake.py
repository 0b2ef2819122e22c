"""A request becomes an arrival: checked, its adapters' names settled, its answer made, not queued.

Knows the model and its limits; no scheduler, no engine, no thread. Any thread may call it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from remora_agent.bank.bank import Bank, Wanted
from remora_agent.bank.directory import AdapterDirectory, Registered
from remora_agent.engine.protocol import EngineLimits
from remora_agent.runtime.activation import activation_start
from remora_agent.runtime.answer import Answer
from remora_agent.runtime.api import (
    AdapterRef,
    AnsweringAdapter,
    GenerationRequest,
    OnEvent,
    Provenance,
)
from remora_agent.runtime.checks import check_embedding, check_request
from remora_agent.runtime.constraint import Grammar, Matcher
from remora_agent.runtime.embedding import Embedding, EmbeddingRequest, OnVector
from remora_agent.runtime.jobs import job_of
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.request import Arrival
from remora_agent.runtime.sampling import Sampler
from remora_agent.text.pipeline import TextPipeline
from remora_contract.bundle import Bundle
from remora_contract.errors import InternalFault

Resolved = list[tuple[Registered, float]]  # with their weights


@dataclass(frozen=True)
class Intake:
    """`seeds` serves requests that name none."""

    bundle: Bundle
    engine_digest: str
    limits: EngineLimits
    options: RuntimeOptions
    text: TextPipeline
    directory: AdapterDirectory
    bank: Bank
    seeds: Callable[[], int]

    def arrival(
        self, request: GenerationRequest, on_event: OnEvent, grammar: Grammar | None, now: float
    ) -> Arrival:
        """`grammar` is the request's compiled constraint. Raises RequestInvalid, PromptTooLong,
        NotFound (adapter), DeadlineExceeded, Exhausted for a mix that can never fit."""
        if request.constraint is not None and grammar is None:
            raise InternalFault("a request's constraint is to be compiled before it is submitted")
        check_request(request, self.limits, self.options, now)
        # Of what is scored as an answer, nothing invokes an adapter.
        invoking = request.prompt[: request.scoring.prompt_from]
        acting = _acting(invoking, self._resolved(request.adapters))
        matcher = None if grammar is None else grammar.start()
        answer = self._answer(self._clipped(request), acting, on_event, now, matcher)
        return self._arrival(answer, acting)

    def embedding_adapters(self, request: EmbeddingRequest, now: float) -> Resolved:
        """Of all its prompts, settled once. Raises as `arrival`, and Unsupported for an engine
        without states."""
        check_embedding(request, self.limits, self.options, now)
        return self._resolved(request.adapters)

    def embedding_provenance(self, request: EmbeddingRequest, adapters: Resolved) -> Provenance:
        """Of its first prompt."""
        return self._provenance(_acting(request.prompts[0], adapters))

    def embedding(
        self,
        request: EmbeddingRequest,
        index: int,
        adapters: Resolved,
        on_admitted: Callable[[float], None],
        on_vector: OnVector,
    ) -> Arrival:
        """One of its prompts. Raises Exhausted for a mix that can never fit."""
        reading = request.reading(index)
        acting = _acting(reading.prompt, adapters)
        made = Embedding(
            reading,
            self._provenance(acting),
            request.pooling,
            request.normalize,
            on_admitted,
            on_vector,
        )
        return self._arrival(made, acting)

    def _resolved(self, named: tuple[AdapterRef, ...]) -> Resolved:
        """Raises NotFound."""
        return [(self.directory.resolve(a.name, a.revision), a.weight) for a in named]

    def _arrival(self, answer: Answer | Embedding, acting: tuple[Wanted, ...]) -> Arrival:
        wanted = tuple(w for w in acting if w.start is not None)
        self.bank.check_fits(wanted)
        borders = tuple(sorted({w.start for w in wanted if w.start}))
        return Arrival(answer, wanted, job_of(answer.request, borders))

    def _clipped(self, request: GenerationRequest) -> GenerationRequest:
        """max_tokens within what the prompt leaves of the context."""
        room = self.limits.context - len(request.prompt)
        if request.stopping.max_tokens <= room:
            return request
        return replace(request, stopping=replace(request.stopping, max_tokens=room))

    def _answer(
        self,
        request: GenerationRequest,
        acting: tuple[Wanted, ...],
        on_event: OnEvent,
        now: float,
        matcher: Matcher | None,
    ) -> Answer:
        return Answer(
            request,
            replace(self._provenance(acting), arm=request.arm),
            Sampler(request.sampling, self.seeds(), request.prompt),
            self.text.detokenizer(request.prompt, request.visible_tokens),
            frozenset(self.bundle.eos_token_ids),
            on_event,
            now,
            matcher,
        )

    def _provenance(self, acting: tuple[Wanted, ...]) -> Provenance:
        adapters = tuple(
            AnsweringAdapter(
                w.adapter.name, w.adapter.revision, w.adapter.digest, w.weight, w.start
            )
            for w in acting
        )
        return Provenance(self.bundle.digest, self.engine_digest, adapters)


def _acting(prompt: tuple[int, ...], adapters: Resolved) -> tuple[Wanted, ...]:
    """With the token of the prompt from which on each acts."""
    return tuple(
        Wanted(found, weight, activation_start(prompt, found.invocation_tokens))
        for found, weight in adapters
    )
