"""A model that TensorRT Edge-LLM's runtime answers for: whole requests, one after another, with one
adapter each. The other `remora_agent.runtime.model.Model`.

Answers and restarts are the `worker`'s; here requests are checked, queued and told of. What it
cannot do is in `request.CANNOT`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.bank.policy import BankLimits
from remora_agent.edgellm.adapters import EdgeAdapters
from remora_agent.edgellm.answering import cancelled_before
from remora_agent.edgellm.bundle import EdgeBundle
from remora_agent.edgellm.child import Patience
from remora_agent.edgellm.loaded import LoadedAdapters
from remora_agent.edgellm.module import BACKEND
from remora_agent.edgellm.pending import Pending, Waiting
from remora_agent.edgellm.request import refuse
from remora_agent.edgellm.worker import Worker
from remora_agent.engine.protocol import EngineLimits
from remora_agent.host import AssignedAdapter
from remora_agent.runtime.api import (
    AnsweringAdapter,
    Constraint,
    GenerationRequest,
    OnEvent,
    Provenance,
    SamplingOverrides,
    SamplingParams,
    StoppingOverrides,
    StoppingParams,
)
from remora_agent.runtime.checks import check_request
from remora_agent.runtime.constraint import Grammar
from remora_agent.runtime.defaults import layered, sampling_params, stopping_params
from remora_agent.runtime.embedding import EmbeddingRequest, OnEmbedded
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.spare import SpareSource
from remora_agent.runtime.status import RuntimeState, RuntimeStatus
from remora_contract.engine_memory import bank_bytes
from remora_contract.errors import (
    PromptTooLong,
    RemoraError,
    Unavailable,
    Unsupported,
)
from remora_contract.release import SamplingDefaults

log = logging.getLogger(__name__)

MAX_ADAPTERS = 64  # in the runtime's map at once, each of the engine's highest rank
_WAIT_S = 0.2


class EdgeModel:
    """Thread-safe. `submit_all` and `cancel` never wait for the runtime."""

    def __init__(
        self,
        opened: EdgeBundle,
        options: RuntimeOptions,
        sampling: SamplingDefaults,
        adapters: Sequence[AssignedAdapter] = (),
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Opens the runtime with `adapters` and waits for it. Raises as `Child`, and what
        registering and converting raise."""
        bundle = self.bundle = opened.bundle
        self._opened, self.text = opened, opened.text
        self.options = replace(options, max_mix=1)
        self._sampling, self._clock = sampling, clock
        self._limits = EngineLimits(1, opened.context, bundle.decoder.vocab, max_bank_rank=0)
        self._metrics = RuntimeMetrics()
        self._pending = Pending(options.max_waiting, options.max_waiting_tokens)
        rank = MAX_ADAPTERS * bundle.graph.max_bank_rank
        self._loaded = LoadedAdapters(BankLimits(rank, options.bank_bytes))
        self._moved: Callable[[str], bool] | None = None
        self._state = RuntimeState.SERVING
        directory = AdapterDirectory(bundle)
        self._worker = Worker(
            opened,
            directory,
            self._pending,
            self._loaded,
            self._metrics,
            clock,
            patience or Patience(),
        )
        self.adapters = EdgeAdapters(
            directory,
            self._loaded,
            self._worker.bring_in,
            self._cancel_using,
            lambda rank: bank_bytes(bundle.decoder, rank, graph=bundle.graph),
        )
        for warning in opened.warnings:
            log.warning("generation_config.not_honoured", extra={"setting": warning})
        for adapter in adapters:
            self.adapters.register(adapter.name, adapter.revision, adapter.directory)
        self._worker.start()

    # -- what surfaces call -----------------------------------------------------------------------

    @property
    def scores(self) -> bool:
        return False

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        raise Unsupported(
            "constraint: not with backend edgellm: its own are not passed on; leave it out"
        )

    def embed(self, request: EmbeddingRequest, on_end: OnEmbedded) -> Callable[[], None]:
        raise Unsupported("embeddings: not with backend edgellm: its runtime gives no states")

    def spare_work(self, source: SpareSource) -> None:
        """Nothing is computed of it: releases with shadows are refused (`scores`)."""

    def end_spare(self) -> None:
        """There is none."""

    def submit_all(
        self,
        requests: Sequence[tuple[GenerationRequest, OnEvent]],
        grammar: Grammar | None = None,
    ) -> None:
        """Queues all or none. Raises Unsupported naming a field that is not honoured, else as
        ModelRuntime.submit_all."""
        now = self._clock()
        arrived = [self._arrival(request, hear, now) for request, hear in requests]
        for waiting in arrived:
            self._worker.lease(waiting, 1)
        try:
            self._pending.add(arrived)
        except RemoraError:
            for waiting in arrived:
                self._worker.lease(waiting, -1)
            raise

    def cancel(self, request_id: str) -> bool:
        waiting = self._pending.take(request_id)
        if waiting is not None:
            self._worker.leave(waiting, cancelled_before(waiting))
            return True
        with self._pending.changed:
            running = self._pending.running
            if running is not None and running.id == request_id:
                running.cancelled = True
                return True  # the worker sees it within a moment
        return self._moved is not None and self._moved(request_id)

    def withdraw(self, among: Collection[str], moved: Callable[[str], bool]) -> tuple[str, ...]:
        self._moved = moved
        gone = self._pending.take_among(among)
        for waiting in gone:
            self._worker.lease(waiting, -1)
        return tuple(w.id for w in gone)

    def probe(self) -> None:
        """One token of the base model. Raises EngineFault."""
        self._worker.probe()

    def sampling(self, asked: SamplingOverrides | None = None) -> SamplingParams:
        return sampling_params(self._defaults(), asked)

    def stopping(self, asked: StoppingOverrides | None = None) -> StoppingParams:
        asked = asked or StoppingOverrides()
        return stopping_params(self._defaults(), asked, self.options.default_max_tokens)

    def set_sampling_defaults(self, sampling: SamplingDefaults) -> None:
        self._sampling = sampling

    def now(self) -> float:
        return self._clock()

    def status(self) -> RuntimeStatus:
        counts = self._metrics
        busy = self._pending.running is not None
        return RuntimeStatus(
            state=RuntimeState.FAILED if self._worker.failed else self._state,
            backend=f"{BACKEND} {self._opened.version}",
            bundle_digest=self.bundle.digest,
            engine_digest=self._opened.engine_digest,
            model_name=self.bundle.source.name,
            context_tokens=self._limits.context,
            rows=1,
            rows_busy=int(busy),
            queued=len(self._pending),
            requests_served=counts.requests - counts.failures,
            requests_failed=counts.failures,
            tokens_generated=counts.tokens,
            heartbeat_age_s=self._worker.heartbeat_age_s(),
            warnings=self._opened.warnings,
        )

    def forget_recent(self) -> None:
        self._metrics.forget_recent()

    def metrics(self) -> Mapping[str, float]:
        """As ModelRuntime's, without what only steps have; `runtime_restarts` for adapters and
        after crashes."""
        return {
            **self._metrics.values(),
            "queue_depth": float(len(self._pending)),
            "rows_busy": float(self._pending.running is not None),
            "swaps": float(self.adapters.directory.swaps),
            "runtime_restarts": float(self._worker.restarts),
            **self._loaded.metrics(),
        }

    def drain(self, timeout_s: float) -> bool:
        if self._state is RuntimeState.SERVING:
            self._state = RuntimeState.DRAINING
        self._pending.refuse(Unavailable("the model is draining; try another device or later"))
        return self._pending.wait_empty(timeout_s)

    def close(self) -> None:
        already, self._state = self._state is RuntimeState.CLOSED, RuntimeState.CLOSED
        if already:
            return
        self._worker.close(Unavailable("the runtime has ended"))

    # -- inside -----------------------------------------------------------------------------------

    def _arrival(self, request: GenerationRequest, on_event: OnEvent, now: float) -> Waiting:
        refuse(request)
        check_request(request, self._limits, self.options, now)
        if len(request.prompt) > self._opened.max_input:
            raise PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens; the engine was built for prompts of "
                f"{self._opened.max_input} at most"
            )
        named = [self.adapters.directory.resolve(a.name, a.revision) for a in request.adapters]
        answering = tuple(AnsweringAdapter(r.name, r.revision, r.digest, 1.0) for r in named)
        provenance = Provenance(
            self.bundle.digest, self._opened.engine_digest, answering, request.arm
        )
        return Waiting(request, on_event, provenance, named[0] if named else None, now)

    def _cancel_using(self, digest: str) -> None:
        for request_id in self._pending.of_adapter(digest):
            self.cancel(request_id)

    def _defaults(self) -> SamplingDefaults:
        return layered(self._sampling, self._opened.sampling)
