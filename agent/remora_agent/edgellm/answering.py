"""One answer as it comes from TensorRT Edge-LLM's runtime: chunks become events, stop strings end
it, times and tokens are counted. Knows no process.
"""

from __future__ import annotations

from collections.abc import Callable

from remora_agent.edgellm.pending import Waiting
from remora_agent.runtime.api import (
    Accepted,
    Delta,
    Failed,
    Finished,
    FinishReason,
    Timings,
    Usage,
)
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.stopping import StopStrings
from remora_contract.errors import DeadlineExceeded, RemoraError

_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "cancelled": FinishReason.CANCELLED,
}


class Answering:
    """Used by the worker thread alone."""

    def __init__(
        self, waiting: Waiting, metrics: RuntimeMetrics, clock: Callable[[], float]
    ) -> None:
        self._waiting, self._metrics, self._clock = waiting, metrics, clock
        self._stops = StopStrings(waiting.request.stopping.stop)
        self._begun_s = self._last_s = clock()
        self._first_s: float | None = None
        self._tokens = 0
        self._match: str | None = None
        self.late = False
        waiting.on_event(Accepted(waiting.id, waiting.provenance))

    @property
    def over(self) -> bool:
        """Whether what still comes is not for the caller."""
        return self._match is not None or self.late or self._waiting.cancelled

    def check_deadline(self) -> bool:
        """Whether it is over now, by its deadline."""
        deadline_s = self._waiting.request.deadline_s
        self.late = self.late or (deadline_s is not None and self._clock() >= deadline_s)
        return self.late

    def chunk(self, text: str, ids: tuple[int, ...]) -> None:
        now = self._clock()
        if ids and self._first_s is None:
            self._first_s = now
            self._metrics.first_token(now - self._waiting.arrived_s)
        # A chunk of several tokens tells one time for all: it is shared among them.
        gaps = [(now - self._last_s) / len(ids)] * len(ids) if self._tokens else []
        self._metrics.step(len(ids), now - self._last_s, gaps)
        self._tokens += len(ids)
        self._last_s = now
        if self.over:
            return
        passed = self._stops.push(text)
        self._match = passed.match
        if passed.text or ids:
            self._waiting.on_event(Delta(passed.text, ids))

    def end(self, reason: str, prompt_tokens: int) -> None:
        if self.late:
            self.fail(DeadlineExceeded("the deadline passed before the answer was complete"))
            return
        ended = _REASONS[reason]
        if self._match is not None:
            ended = FinishReason.STOP
        elif self._waiting.cancelled:
            ended = FinishReason.CANCELLED
        elif held := self._stops.flush():
            self._waiting.on_event(Delta(held, ()))
        self._metrics.ended(failed=False)
        first_s = self._first_s or self._last_s
        usage = Usage(prompt_tokens, 0, self._tokens)
        timings = Timings(
            queue_s=self._begun_s - self._waiting.arrived_s,
            prefill_s=first_s - self._begun_s,
            decode_s=self._last_s - first_s,
            time_to_first_token_s=first_s - self._waiting.arrived_s,
        )
        self._waiting.on_event(
            Finished(ended, usage, timings, self._waiting.provenance, self._match or "")
        )

    def fail(self, error: RemoraError) -> None:
        self._metrics.ended(failed=True)
        self._waiting.on_event(Failed(error))


def cancelled_before(waiting: Waiting) -> Finished:
    """The end of one that had not begun."""
    usage, timings = Usage(len(waiting.request.prompt), 0, 0), Timings(0.0, 0.0, 0.0, 0.0)
    return Finished(FinishReason.CANCELLED, usage, timings, waiting.provenance)
