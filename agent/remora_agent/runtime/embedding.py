"""Vectors of texts: what a request for them is, and one text's way through a row.

An embedding waits, is admitted and reads its prompt in chunks as any request does, so generation
goes on beside it; it ends with its last chunk and draws no token. The states of the chunks are
pooled as they come:

    last    h_n                        mean    (h_1 + ... + h_n) / n
    unit    v / |v|                    a vector of zeros stays one

Knows nothing of other requests, queues, engines or adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.api import (
    AdapterRef,
    Failed,
    FinishReason,
    GenerationRequest,
    Provenance,
    SamplingParams,
    Share,
    StoppingParams,
)
from remora_contract.errors import Cancelled, EngineFault, RemoraError

log = logging.getLogger(__name__)

Vector = NDArray[np.float32]  # [hidden]


class Pooling(Enum):
    LAST = "last"  # the last token's state
    MEAN = "mean"  # the mean of all tokens' states


@dataclass(frozen=True)
class EmbeddingRequest:
    request_id: str
    prompts: tuple[tuple[int, ...], ...]
    adapters: tuple[AdapterRef, ...] = ()
    pooling: Pooling = Pooling.LAST
    normalize: bool = True
    deadline_s: float | None = None  # of all together, on the runtime's clock; None: none
    share: Share = field(default_factory=Share)

    def reading(self, index: int) -> GenerationRequest:
        """The reading of one prompt, as the runtime queues it: nothing is generated."""
        return GenerationRequest(
            f"{self.request_id}/{index}",
            self.prompts[index],
            self.adapters,
            SamplingParams(),
            StoppingParams(1),
            self.deadline_s,
            share=self.share,
        )


@dataclass(frozen=True)
class Embedded:
    vectors: NDArray[np.float32]  # [prompts, hidden]
    prompt_tokens: tuple[int, ...]
    queue_s: float  # until the first prompt had a row
    prefill_s: float  # from then on
    provenance: Provenance  # of the first prompt, as to where adapters begin to act


# Called once on the step thread, quickly and without raising.
OnEmbedded = Callable[[Embedded | Failed], None]
OnVector = Callable[["Vector | RemoraError"], None]


class Embedding:
    """One prompt from admission to its vector."""

    def __init__(
        self,
        request: GenerationRequest,
        provenance: Provenance,
        pooling: Pooling,
        normalize: bool,
        on_admitted: Callable[[float], None],
        on_vector: OnVector,
    ) -> None:
        self.request = request
        self.provenance = provenance
        self.cached_tokens = 0
        self._pooling = pooling
        self._normalize = normalize
        self._on_admitted = on_admitted
        self._on_vector = on_vector
        self._sum: NDArray[np.float64] | None = None
        self._count = 0

    def admitted(self, now: float) -> None:
        """It has a row."""
        self._on_admitted(now)

    def read(self, states: NDArray[np.float32]) -> None:
        """The states [s, hidden] of the next chunk."""
        if self._pooling is Pooling.LAST:
            self._sum, self._count = states[-1].astype(np.float64), 1
            return
        more = states.sum(axis=0, dtype=np.float64)
        self._sum = more if self._sum is None else self._sum + more
        self._count += len(states)

    def finish(self, reason: FinishReason, now: float) -> None:
        """The end: its vector, or that it was cancelled."""
        if reason is FinishReason.CANCELLED:
            self.fail(Cancelled("the embedding was cancelled"))
            return
        vector = self._vector()
        if np.isfinite(vector).all():
            self._on_vector(vector)
        else:
            self.fail(EngineFault("the engine's states are not finite"))

    def fail(self, error: RemoraError) -> None:
        """The end instead."""
        self._on_vector(error)

    def _vector(self) -> Vector:
        assert self._sum is not None  # every prompt has a token
        pooled = self._sum / self._count
        if self._normalize:
            length = float(np.linalg.norm(pooled))
            pooled = pooled / length if length else pooled
        return pooled.astype(np.float32)
