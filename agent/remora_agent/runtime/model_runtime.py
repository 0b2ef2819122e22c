"""A model that answers: one engine, its adapters, its text, one step thread. What surfaces call.

Owns the engine from construction to `close`. Knows no wire format and no control plane.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from remora_agent.bank.bank import Bank, BankOptions
from remora_agent.bank.directory import AdapterDirectory
from remora_agent.bank.heap import give_back
from remora_agent.bank.host import HostCache
from remora_agent.bank.loader import Load, Loader
from remora_agent.bank.weights import AdapterWeights, load_weights
from remora_agent.engine.protocol import Engine
from remora_agent.runtime.adapters import Adapters
from remora_agent.runtime.api import (
    Constraint,
    GenerationRequest,
    OnEvent,
    SamplingOverrides,
    SamplingParams,
    StoppingOverrides,
    StoppingParams,
)
from remora_agent.runtime.constraint import Grammar, GrammarCompiler
from remora_agent.runtime.defaults import (
    GenerationDefaults,
    layered,
    load_generation_defaults,
    sampling_params,
    stopping_params,
)
from remora_agent.runtime.embedding import EmbeddingRequest, OnEmbedded, OnVector
from remora_agent.runtime.embedding_batch import EmbeddingBatch
from remora_agent.runtime.intake import Intake
from remora_agent.runtime.jobs import SchedulerLimits
from remora_agent.runtime.memory_floor import MemoryFloor
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.options import MAX_DRAFT_TOKENS, RuntimeOptions
from remora_agent.runtime.prefix_cache import PrefixCache
from remora_agent.runtime.request import Arrival
from remora_agent.runtime.scheduler import Scheduler
from remora_agent.runtime.spare import SpareSource
from remora_agent.runtime.speculation import speculation_of
from remora_agent.runtime.status import RuntimeState, RuntimeStatus
from remora_agent.runtime.step_forms import forms_agree
from remora_agent.runtime.step_loop import StepLoop
from remora_agent.runtime.stepper import Stepper
from remora_agent.text.pipeline import TextPipeline
from remora_contract.bundle import Bundle
from remora_contract.engine_memory import bank_bytes
from remora_contract.errors import EngineFault, RemoraError, Unavailable
from remora_contract.release import SamplingDefaults

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 120.0  # a first step may read all weights from a slow disk


class ModelRuntime:
    """Thread-safe. `submit` and `cancel` never wait for the engine: an event loop may call them."""

    def __init__(
        self,
        engine: Engine,
        bundle: Bundle,
        text: TextPipeline,
        directory: AdapterDirectory | None = None,
        options: RuntimeOptions | None = None,
        sampling: SamplingDefaults | None = None,
        generation: GenerationDefaults | None = None,
        clock: Callable[[], float] = time.monotonic,
        seeds: Callable[[], int] = lambda: secrets.randbits(64),
        load: Load | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> None:
        """Starts the step thread. `sampling` are the release's defaults and win over `generation`,
        the bundle's (`load_generation_defaults`). `directory` None is an empty one. `seeds` serves
        requests without a seed; `load` reads an adapter directory (default: `load_weights`);
        `free_bytes` tells the system's free memory (None: the floor is not kept)."""
        self.bundle = bundle
        self.text = text
        self.options = options or RuntimeOptions()
        self._generation = generation or GenerationDefaults()
        self._sampling = sampling or SamplingDefaults()
        self._clock, self._engine = clock, engine
        self._limits = engine.limits
        self._state = RuntimeState.SERVING
        self._metrics = RuntimeMetrics()
        read = load or (lambda d: load_weights(d, bundle))
        self._loader = Loader(lambda d: engine.prepare(read(d)), self._on_loaded, clock)
        host = HostCache(self.options.host_bytes)
        self._bank = Bank(engine, host, self._loader, clock, _bank_options(self.options))
        scheduler = Scheduler(_scheduler_limits(engine.limits.rows, self.options))
        memory = MemoryFloor(
            free_bytes if self.options.memory_floor_bytes else None,
            self.options.memory_floor_bytes,
            engine.limits.rows,
            engine.limits.kv_token_bytes,
            clock,
        )
        self._prefixes = PrefixCache(engine, self.options.prefix_bytes, lambda: memory.low)
        self._speculation = speculation_of(self.options, engine.limits.scored)
        self._stepper = Stepper(
            engine,
            self._bank,
            scheduler,
            self._metrics,
            clock,
            self._prefixes,
            memory,
            self._speculation,
        )
        self._moved: Callable[[str], bool] | None = None
        self._loop = StepLoop(self._stepper.step, self._on_exit, clock)
        vocab = engine.limits.vocab
        self._grammars = GrammarCompiler(
            lambda: text.token_bytes(vocab), vocab, bundle.eos_token_ids
        )
        self._directory = directory or AdapterDirectory(bundle)
        self._intake = Intake(
            bundle,
            engine.digest,
            engine.limits,
            self.options,
            text,
            self._directory,
            self._bank,
            seeds,
        )
        self.adapters = Adapters(
            self._directory,
            self._bank,
            self._stepper,
            self._loop,
            lambda rank: bank_bytes(bundle.decoder, rank, graph=bundle.graph),
        )
        for warning in self._generation.warnings:
            log.warning("generation_config.not_honoured", extra={"setting": warning})
        self._loop.start()

    @classmethod
    def open(
        cls,
        engine: Engine,
        bundle: Bundle,
        bundle_directory: Path,
        directory: AdapterDirectory | None = None,
        options: RuntimeOptions | None = None,
        sampling: SamplingDefaults | None = None,
        free_bytes: Callable[[], int] | None = None,
    ) -> ModelRuntime:
        """With text and generation config as the bundle's directory has them. Raises
        ArtifactInvalid; the engine is the caller's then."""
        text = TextPipeline.load(bundle_directory)
        generation = load_generation_defaults(bundle_directory)
        return cls(
            engine,
            bundle,
            text,
            directory,
            options,
            sampling,
            generation,
            free_bytes=free_bytes,
        )

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """What `submit` needs of a request with a constraint; not waited for here. Raises, and the
        future raises, as GrammarCompiler.compile says."""
        return self._grammars.compile(constraint)

    def submit(
        self, request: GenerationRequest, on_event: OnEvent, grammar: Grammar | None = None
    ) -> None:
        """Queues a request; its adapters are resolved to digests here, once. `grammar` is its
        compiled constraint.

        Raises at once, and then `on_event` is never called: RequestInvalid, PromptTooLong,
        NotFound (adapter), Conflict (request id in use), Exhausted (queue full, with
        retry_after_s; or a mix that can never fit), DeadlineExceeded, Unavailable (draining,
        closed).
        """
        self.submit_all([(request, on_event)], grammar)

    def submit_all(
        self,
        requests: Sequence[tuple[GenerationRequest, OnEvent]],
        grammar: Grammar | None = None,
    ) -> None:
        """Queues all of them, or none and raises as `submit` does."""
        now = self._clock()
        self._stepper.add_all([self._intake.arrival(r, hear, grammar, now) for r, hear in requests])
        self._loop.wake()

    def embed(self, request: EmbeddingRequest, on_end: OnEmbedded) -> Callable[[], None]:
        """Queues the prompts of a request, their adapters resolved once for all; returns what
        cancels it. Raises as `submit` does, and Unsupported for an engine without states."""
        adapters = self._intake.embedding_adapters(request, self._clock())

        def queue(index: int, on_admitted: Callable[[float], None], heard: OnVector) -> None:
            new = self._intake.embedding(request, index, adapters, on_admitted, heard)
            self._stepper.add(new, begun=index > 0)
            self._loop.wake()

        provenance = self._intake.embedding_provenance(request, adapters)
        batch = EmbeddingBatch(request, provenance, queue, self.cancel, self._clock, on_end)
        batch.start()
        return batch.cancel

    def spare_work(self, source: SpareSource) -> None:
        """From now on asks `source` what to compute while there is nothing else: one at a time, on
        what is resident, until anybody's request comes."""

        def arriving(r: GenerationRequest, hear: OnEvent, grammar: Grammar | None) -> Arrival:
            return self._intake.arrival(r, hear, grammar, self._clock())

        self._stepper.spare.take_from(source, arriving)

    def end_spare(self) -> None:
        """What is computed of `spare_work` ends, after the step that runs."""
        self._loop.post(self._stepper.end_spare)

    @property
    def scores(self) -> bool:
        """Whether the engine tells the logprobs of a prompt's tokens."""
        return self._limits.scored > 0

    def cancel(self, request_id: str) -> bool:
        """Whether it was found; it then ends with Finished(CANCELLED), unless it ends otherwise
        in the step that is running."""
        found = self._stepper.cancel(request_id)
        if not found and self._moved is not None:
            # What was handed back meanwhile is here again.
            found = self._moved(request_id) or self._stepper.cancel(request_id)
        self._loop.wake()
        return found

    def withdraw(self, among: Collection[str], moved: Callable[[str], bool]) -> tuple[str, ...]:
        """Takes out the requests of `among` that have no row yet: at most Accepted they may still
        hear from here, and `cancel` asks `moved` about them. In the order of arrival."""
        self._moved = moved
        return self._stepper.withdraw(among)

    def probe(self) -> None:
        """One token through the engine, before any request; with `exact_drafts` also whether they
        can be exact, else there are none. Raises EngineFault, Unavailable."""

        def on_step_thread() -> None:
            logits = self._engine.prefill(0, np.zeros(1, np.int64), 0)
            if not np.isfinite(logits).all():
                raise EngineFault("the engine's first logits are not numbers; build it again")
            if self.options.exact_drafts and not forms_agree(self._engine, MAX_DRAFT_TOKENS):
                log.warning("speculation.not_exact", extra={"drafts": "off"})
                self._speculation.give_up()

        self._loop.call(on_step_thread, PROBE_TIMEOUT_S)

    def sampling(self, asked: SamplingOverrides | None = None) -> SamplingParams:
        """A request's explicit fields over release, bundle and agent defaults. The values are
        checked by `submit`."""
        return sampling_params(self._defaults(), asked)

    def stopping(self, asked: StoppingOverrides | None = None) -> StoppingParams:
        """The same for stopping."""
        asked = asked or StoppingOverrides()
        return stopping_params(self._defaults(), asked, self.options.default_max_tokens)

    def set_sampling_defaults(self, sampling: SamplingDefaults) -> None:
        """A new release's defaults, for requests from now on."""
        self._sampling = sampling

    def now(self) -> float:
        """The clock `GenerationRequest.deadline_s` is measured on, in seconds."""
        return self._clock()

    def status(self) -> RuntimeStatus:
        rows_busy, queued = self._stepper.load
        return RuntimeStatus(
            state=RuntimeState.FAILED if self._loop.failed else self._state,
            backend=self._engine.backend,
            bundle_digest=self.bundle.digest,
            engine_digest=self._engine.digest,
            model_name=self.bundle.source.name,
            context_tokens=self._limits.context,
            rows=self._limits.rows,
            rows_busy=rows_busy,
            queued=queued,
            requests_served=self._metrics.requests - self._metrics.failures,
            requests_failed=self._metrics.failures,
            tokens_generated=self._metrics.tokens,
            heartbeat_age_s=self._loop.heartbeat_age_s(),
            warnings=self._generation.warnings,
        )

    def forget_recent(self) -> None:
        """Medians and rates of `metrics` are of what comes from now on; counts go on."""
        self._metrics.forget_recent()

    def metrics(self) -> Mapping[str, float]:
        """Since start: requests, failures, tokens, drafted_tokens, accepted_tokens, swaps (of
        aliases), the bank's counters, prefix_lookups, prefix_hits, prefix_tokens,
        prefix_evictions; now: queue_depth, rows_busy, prefix_bytes and what is resident
        (BankSnapshot.metrics); recently: ttft_s, ttft_p95_s, inter_token_s, tokens_per_s,
        scheduler_step_s (a step outside the engine)."""
        rows_busy, queued = self._stepper.load
        return {
            **self._metrics.values(),
            "queue_depth": float(queued),
            "rows_busy": float(rows_busy),
            "swaps": float(self._directory.swaps),
            **self._bank.snapshot.metrics(),
            **self._prefix_metrics(),
        }

    def _prefix_metrics(self) -> dict[str, float]:
        counts = self._prefixes.counts
        return {
            "prefix_lookups": float(counts.lookups),
            "prefix_hits": float(counts.hits),
            "prefix_tokens": float(counts.tokens),
            "prefix_evictions": float(counts.evictions),
            "prefix_bytes": float(counts.bytes),
        }

    def drain(self, timeout_s: float) -> bool:
        """Admits nothing from now on and waits for the rest. Whether all ended in time."""
        if self._state is RuntimeState.SERVING:
            self._state = RuntimeState.DRAINING
            self._stepper.refuse(Unavailable("the model is draining; try another device or later"))
        return self._stepper.wait_empty(timeout_s)

    def close(self) -> None:
        """Ends what is left with Failed(Unavailable), stops the thread, closes the engine. A
        second call does nothing."""
        self._state = RuntimeState.CLOSED
        self._loop.stop()
        self._loader.close()
        self._grammars.close()
        give_back()

    def _defaults(self) -> SamplingDefaults:
        return layered(self._sampling, self._generation.sampling)

    def _on_loaded(self, digest: str, result: AdapterWeights | RemoraError, seconds: float) -> None:
        self._loop.post(lambda: self._bank.loaded(digest, result, seconds))

    def _on_exit(self, error: RemoraError) -> None:
        """On the step thread, last."""
        self._stepper.refuse(Unavailable("the runtime has ended"))
        self._stepper.fail_all(error, broken=self._loop.failed)
        if self._loop.failed:
            self._bank.fail_preloads(error)
        else:
            self._bank.close(error)
            self._engine.close()


def _bank_options(options: RuntimeOptions) -> BankOptions:
    return BankOptions(options.bank_rank, options.bank_bytes, options.patience_s)


def _scheduler_limits(rows: int, options: RuntimeOptions) -> SchedulerLimits:
    return SchedulerLimits(
        rows=rows,
        max_waiting=options.max_waiting,
        max_waiting_tokens=options.max_waiting_tokens,
        prefill_chunk=options.prefill_chunk,
        aging_s=options.aging_s,
        inter_token_s=options.inter_token_s,
        spare_after_s=options.spare_after_s,
    )
