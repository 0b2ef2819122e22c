"""One step of the runtime: carries out what the scheduler decides, on the bank and the engine.

`step` belongs to the step thread; `add`, `cancel` and the counts to any. The lock guards the
scheduler and the table of answers; it is never held while the engine computes or a listener hears.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from remora_agent.bank.bank import Bank, Lease, Wanted
from remora_agent.engine.protocol import Engine, Mix, RowStep
from remora_agent.runtime.answer import Answer, TokenTaken
from remora_agent.runtime.api import FinishReason
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.sampling import Logits
from remora_agent.runtime.scheduler import (
    DecodeStep,
    EndCause,
    Job,
    PrefillChunk,
    Scheduler,
    Work,
)
from remora_contract.errors import DeadlineExceeded, RemoraError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """An accepted request with all that its steps need."""

    answer: Answer
    wanted: tuple[Wanted, ...]
    lease: Lease | None = None  # from admission on

    def mix_at(self, position: int) -> Mix:
        return self.lease.mix_at(position) if self.lease is not None else ()

    @property
    def id(self) -> str:
        return self.answer.request.request_id

    def uses(self, digest: str) -> bool:
        return any(w.adapter.digest == digest for w in self.wanted)


@dataclass(frozen=True)
class Arrival:
    """A request on its way into the queue."""

    answer: Answer
    wanted: tuple[Wanted, ...]
    job: Job


class Stepper:
    def __init__(
        self,
        engine: Engine,
        bank: Bank,
        scheduler: Scheduler,
        metrics: RuntimeMetrics,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._bank = bank
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._changed = threading.Condition()
        self._requests: dict[str, Request] = {}
        self._fresh: list[Answer] = []
        self._closed: RemoraError | None = None

    # -- any thread -------------------------------------------------------------------------

    def add(self, answer: Answer, wanted: tuple[Wanted, ...], job: Job) -> None:
        """Queues it. Raises what the scheduler refuses with, and what `refuse` was given."""
        with self._changed:
            if self._closed is not None:
                raise self._closed
            self._scheduler.submit(job, self._clock())
            self._requests[job.request_id] = Request(answer, wanted)
            self._fresh.append(answer)

    def add_all(self, arrivals: Sequence[Arrival]) -> None:
        """All of them or none: raises as `add` does."""
        added: list[Arrival] = []
        with self._changed:
            try:
                for arrival in arrivals:
                    self.add(arrival.answer, arrival.wanted, arrival.job)
                    added.append(arrival)
            except RemoraError:
                for arrival in added:
                    self._take_back(arrival)
                raise

    def _take_back(self, arrival: Arrival) -> None:
        self._scheduler.end(arrival.job.request_id, self._clock())
        del self._requests[arrival.job.request_id]
        self._fresh.remove(arrival.answer)

    def cancel(self, request_id: str) -> bool:
        with self._changed:
            return self._scheduler.cancel(request_id)

    def cancel_using(self, digest: str) -> int:
        """Cancels every request with this adapter; how many."""
        with self._changed:
            using = [r.id for r in self._requests.values() if r.uses(digest)]
            return sum(self._scheduler.cancel(request_id) for request_id in using)

    def refuse(self, error: RemoraError) -> None:
        """New requests get `error` from now on."""
        with self._changed:
            self._closed = error

    def wait_empty(self, timeout_s: float) -> bool:
        """Whether all requests have ended within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._scheduler.empty, timeout_s)

    @property
    def queued(self) -> int:
        return self._scheduler.queued

    @property
    def rows_busy(self) -> int:
        return self._scheduler.rows_busy

    # -- step thread ------------------------------------------------------------------------

    def step(self) -> float | None:
        """Does one thing for all. None: call again at once; else how many seconds nothing will
        happen unless someone calls."""
        began = time.perf_counter()
        self._greet_and_reap()
        self._fail_unreadable()
        self._admit()
        self._prefetch()
        with self._changed:
            work = self._scheduler.next_work()
        if work is None:
            return self._idle_s()
        engine_s = self._compute(work)
        self._metrics.overhead(time.perf_counter() - began - engine_s)
        return None

    def fail_all(self, error: RemoraError) -> None:
        """Ends everything that is left."""
        self._greet_and_reap()
        for request in list(self._requests.values()):
            self._fail(request, error)

    def _greet_and_reap(self) -> None:
        now = self._clock()
        with self._changed:
            fresh, self._fresh = self._fresh, []
            ended = [(self._requests.pop(e.request_id), e.cause) for e in self._scheduler.reap(now)]
            self._changed.notify_all()
        for answer in fresh:
            answer.accept()
        for request, cause in ended:
            self._release(request)
            if cause is EndCause.CANCELLED:
                self._metrics.ended(failed=False)
                request.answer.finish(FinishReason.CANCELLED, now)
            else:
                self._metrics.ended(failed=True)
                request.answer.fail(DeadlineExceeded("the request's deadline has passed"))

    def _fail_unreadable(self) -> None:
        for digest, error in self._bank.take_failures().items():
            for request in self._waiting():
                if request.uses(digest):
                    self._fail(request, error)

    def _admit(self) -> None:
        now = self._clock()
        with self._changed:
            candidates = [self._requests[i] for i in self._scheduler.candidates(now)]
        for request in candidates:
            if not self._scheduler.row_free:
                return
            try:
                lease = self._bank.acquire(request.wanted)
            except RemoraError as e:
                self._fail(request, e)
                continue
            if lease is not None:
                with self._changed:
                    self._scheduler.admit(request.id, now)
                    self._requests[request.id] = replace(request, lease=lease)
                request.answer.admitted(now)

    def _prefetch(self) -> None:
        self._bank.prefetch(r.wanted for r in self._waiting() if r.wanted)
        self._bank.serve_preloads()

    def _idle_s(self) -> float:
        with self._changed:
            deadline = self._scheduler.next_deadline_s()
        return float("inf") if deadline is None else max(0.0, deadline - self._clock())

    def _compute(self, work: Work) -> float:
        """Seconds in the engine."""
        requests = self._of(work)
        began = time.perf_counter()
        try:
            logits = self._run(work, requests)
        except RemoraError as e:
            log.warning("engine.step_failed", extra={"rows": len(requests), "error": str(e)})
            for request in requests:
                self._fail(request, e)
            return time.perf_counter() - began
        engine_s = time.perf_counter() - began
        with self._changed:
            self._scheduler.done(work)
        self._take(requests, logits, engine_s)
        return engine_s

    def _of(self, work: Work) -> list[Request]:
        ids = work.request_ids if isinstance(work, DecodeStep) else (work.request_id,)
        return [self._requests[i] for i in ids]

    def _run(self, work: Work, requests: Sequence[Request]) -> list[Logits]:
        """The logits [vocab] of each request that gets a token."""
        if isinstance(work, PrefillChunk):
            (request,) = requests
            tokens = np.asarray(request.answer.request.prompt[work.start : work.stop], np.int64)
            mix = request.mix_at(work.start)
            logits = self._engine.prefill(work.row, tokens, work.start, mix)
            return [logits] if work.last else []
        steps = [
            RowStep(row, r.answer.tokens[-1], r.answer.position, r.mix_at(r.answer.position))
            for row, r in zip(work.rows, requests, strict=True)
        ]
        return list(self._engine.decode(steps))

    def _take(self, requests: Sequence[Request], logits: Iterable[Logits], engine_s: float) -> None:
        """A token for each; counted before anybody hears that an answer is complete."""
        now = self._clock()
        pairs = [
            (request, taken)
            for request, row_logits in zip(requests, logits, strict=False)
            if (taken := self._take_one(request, row_logits, now)) is not None
        ]
        between = [taken.since_last_s for _, taken in pairs if not taken.first]
        self._metrics.step(len(pairs), engine_s, between)
        for request, taken in pairs:
            if taken.first:
                self._metrics.first_token(taken.since_last_s)
            if taken.reason is not None:
                self._end(request)
                self._metrics.ended(failed=False)
                request.answer.finish(taken.reason, now)

    def _take_one(self, request: Request, logits: Logits, now: float) -> TokenTaken | None:
        try:
            taken = request.answer.take(logits, now)
        except RemoraError as e:
            self._fail(request, e)
            return None
        if request.answer.deaf:
            self.cancel(request.id)
        return taken

    def _fail(self, request: Request, error: RemoraError) -> None:
        self._end(request)
        self._metrics.ended(failed=True)
        request.answer.fail(error)

    def _end(self, request: Request) -> None:
        """Out of bank, scheduler and table before the last event: whoever hears it sees the bank
        without the request and may use its id again."""
        self._release(request)
        with self._changed:
            self._scheduler.end(request.id, self._clock())
            del self._requests[request.id]
            self._changed.notify_all()

    def _release(self, request: Request) -> None:
        if request.lease is not None:
            self._bank.release(request.lease)

    def _waiting(self) -> list[Request]:
        with self._changed:
            return [self._requests[i] for i in self._scheduler.waiting()]
