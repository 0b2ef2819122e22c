"""The prompts of one embedding request, two of them at a time: one computes, one waits for its turn
as any request does, so that a long list holds up nobody. The first enters by the queue's bounds;
the next takes the place that one before it has left, though others may have filled the queue
meanwhile: a list that has begun is not refused halfway.

Belongs to the step thread from its first prompt's admission on. There is always a prompt in the
runtime until the last has ended: a model that drains waits for all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from remora_agent.runtime.api import Failed, Provenance
from remora_agent.runtime.embedding import (
    Embedded,
    EmbeddingRequest,
    OnEmbedded,
    OnVector,
    Vector,
)
from remora_contract.errors import RemoraError

# Queues one prompt of the request; the first callable hears when it has a row. Raises as
# `ModelRuntime.submit` does.
Queue = Callable[[int, Callable[[float], None], OnVector], None]


class EmbeddingBatch:
    """`start`, and `on_end` hears the vectors or the first error, once."""

    def __init__(
        self,
        request: EmbeddingRequest,
        provenance: Provenance,
        queue: Queue,
        cancel: Callable[[str], bool],
        clock: Callable[[], float],
        on_end: OnEmbedded,
    ) -> None:
        """`provenance`: of the first prompt. It is known before any is queued: the list may end
        while `start` still runs."""
        self._request = request
        self._provenance = provenance
        self._queue = queue
        self._cancel = cancel
        self._clock = clock
        self._on_end = on_end
        self._vectors: dict[int, Vector] = {}
        self._queued = 0  # prompts, in their order
        self._submitted_s = clock()
        self._admitted_s = self._submitted_s
        self._ended = False

    def start(self) -> None:
        """Queues the first prompt. Raises as `queue` does; `on_end` hears nothing then."""
        self._queue_next()

    def cancel(self) -> None:
        """Any thread. `on_end` hears Cancelled, unless it ends otherwise in the running step."""
        for index in range(self._queued + 1):  # one more: it may be queued meanwhile
            if index < len(self._request.prompts) and index not in self._vectors:
                self._cancel(self._request.reading(index).request_id)

    def _queue_next(self) -> None:
        index, self._queued = self._queued, self._queued + 1
        self._queue(
            index, lambda now: self._admitted(index, now), lambda found: self._heard(index, found)
        )

    def _admitted(self, index: int, now: float) -> None:
        if index == 0:
            self._admitted_s = now
            self._go_on()

    def _heard(self, index: int, found: Vector | RemoraError) -> None:
        if self._ended:
            return
        if isinstance(found, RemoraError):
            self._fail(found)
            return
        self._vectors[index] = found
        if len(self._vectors) == len(self._request.prompts):
            self._ended = True
            self._on_end(self._embedded())
        else:
            self._go_on()

    def _go_on(self) -> None:
        if self._queued == len(self._request.prompts):
            return
        try:
            self._queue_next()
        except RemoraError as e:
            self._fail(e)

    def _fail(self, error: RemoraError) -> None:
        self._ended = True
        self.cancel()
        self._on_end(Failed(error))

    def _embedded(self) -> Embedded:
        return Embedded(
            np.stack([self._vectors[i] for i in range(len(self._vectors))]),
            tuple(map(len, self._request.prompts)),
            self._admitted_s - self._submitted_s,
            self._clock() - self._admitted_s,
            self._provenance,
        )
