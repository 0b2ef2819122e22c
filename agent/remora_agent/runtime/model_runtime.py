"""A model that answers: one engine, its adapters, its text, one step thread. What surfaces call.

Owns the engine from construction to `close`. Knows no wire format and no control plane.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.engine.protocol import Engine
from remora_agent.runtime.adapters import Adapters
from remora_agent.runtime.api import GenerationRequest, OnEvent, SamplingParams, StoppingParams
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.status import RuntimeStatus
from remora_agent.text.pipeline import TextPipeline
from remora_contract.bundle import Bundle
from remora_contract.release import SamplingDefaults


class ModelRuntime:
    """Thread-safe. `submit` and `cancel` never wait for the engine: an event loop may call them."""

    adapters: Adapters
    text: TextPipeline  # tokenizer, chat template, detokenisation
    bundle: Bundle

    def __init__(
        self,
        engine: Engine,
        bundle: Bundle,
        text: TextPipeline,
        directory: AdapterDirectory | None = None,
        options: RuntimeOptions | None = None,
        sampling: SamplingDefaults | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the step thread. `sampling` are the release's defaults, they win over the
        bundle's generation config. `directory` None is an empty one."""
        raise NotImplementedError

    def submit(self, request: GenerationRequest, on_event: OnEvent) -> None:
        """Queues a request; its adapters are resolved to digests here, once.

        Raises at once, and then `on_event` is never called: RequestInvalid, PromptTooLong,
        NotFound (adapter), Conflict (request id in use), Exhausted (queue full, with
        retry_after_s; or a mix that can never fit), Unavailable (draining, closed).
        """
        raise NotImplementedError

    def cancel(self, request_id: str) -> bool:
        """Whether it was found; it then ends with Finished(CANCELLED)."""
        raise NotImplementedError

    def sampling(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> SamplingParams:
        """A request's explicit fields over release, bundle and agent defaults. The values are
        checked by `submit`."""
        raise NotImplementedError

    def stopping(
        self,
        max_tokens: int | None = None,
        stop: tuple[str, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
        ignore_eos: bool = False,
    ) -> StoppingParams:
        """The same for stopping."""
        raise NotImplementedError

    def set_sampling_defaults(self, sampling: SamplingDefaults) -> None:
        """A new release's defaults, for requests from now on."""
        raise NotImplementedError

    def now(self) -> float:
        """The clock `GenerationRequest.deadline_s` is measured on, in seconds."""
        raise NotImplementedError

    def status(self) -> RuntimeStatus:
        raise NotImplementedError

    def metrics(self) -> Mapping[str, float]:
        """Since start: ttft_s, ttft_p95_s, inter_token_s, tokens_per_s, queue_depth, rows_busy,
        requests, failures, tokens, adapter_hits, adapter_loads, adapter_evictions, last_swap_s,
        scheduler_step_s."""
        raise NotImplementedError

    def drain(self, timeout_s: float) -> bool:
        """Admits nothing from now on and waits for the rest. Whether all ended in time."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what is left with Failed(Unavailable), stops the thread, closes the engine."""
        raise NotImplementedError
