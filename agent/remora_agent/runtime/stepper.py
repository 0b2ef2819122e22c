"""One step of the runtime: carries out what the scheduler decides, on the bank and the engine.

`step` belongs to the step thread; `add`, `cancel` and the counts to any. The lock guards the
scheduler and the table of answers; it is never held while the engine computes or a listener hears.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from remora_agent.bank.bank import Bank, Lease
from remora_agent.engine.protocol import Engine
from remora_agent.runtime.answer import Answer
from remora_agent.runtime.api import FinishReason
from remora_agent.runtime.beside import Beside
from remora_agent.runtime.computing import Computing
from remora_agent.runtime.embedding import Embedding
from remora_agent.runtime.memory_floor import RETRY_AFTER_S, MemoryFloor
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.prefix_cache import PrefixCache
from remora_agent.runtime.prefix_keys import Acting, PrefixKeys
from remora_agent.runtime.request import Arrival, Request
from remora_agent.runtime.scheduler import EndCause, Scheduler
from remora_agent.runtime.spare import SpareWork
from remora_agent.runtime.speculation import Speculation
from remora_agent.runtime.taking import Taking
from remora_agent.runtime.work import PrefillChunk, Work
from remora_contract.errors import DeadlineExceeded, Exhausted, RemoraError, anew

log = logging.getLogger(__name__)


class Stepper:
    def __init__(
        self,
        engine: Engine,
        bank: Bank,
        scheduler: Scheduler,
        metrics: RuntimeMetrics,
        clock: Callable[[], float],
        prefixes: PrefixCache,
        memory: MemoryFloor,
        speculation: Speculation,
    ) -> None:
        self._engine = engine
        self._bank = bank
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._prefixes = prefixes
        self._memory = memory
        self._beside = Beside(engine)
        self._computing = Computing(engine, speculation, self._beside)
        self._taking = Taking(metrics, self._drafted, self._fail, self.cancel)
        self._changed = threading.Condition()
        self._requests: dict[str, Request] = {}
        self._fresh: list[Answer | Embedding] = []
        self._closed: RemoraError | None = None
        self.spare = SpareWork(bank, scheduler, prefixes, memory, clock)

    # -- any thread -------------------------------------------------------------------------

    def add(self, new: Arrival, *, begun: bool = False) -> None:
        """Queues it. Raises Conflict, and, unless it is a part of what has `begun`, what the
        scheduler refuses with, Exhausted while memory is short and what `refuse` was given."""
        with self._changed:
            now = self._clock()
            if not begun:
                self._check_open(new, now)
            self._scheduler.submit(new.job, now, begun=begun)
            self._requests[new.job.request_id] = Request(new.answer, new.wanted, new.job)
            self._fresh.append(new.answer)

    def _check_open(self, new: Arrival, now: float) -> None:
        if self._closed is not None:
            raise anew(self._closed)
        scheduler = self._scheduler
        rows = scheduler.free_rows or range(self._engine.limits.rows)
        short = self._memory.refusal(new.job, scheduler.running(), rows)
        if short is not None:
            wait_s = scheduler.retry_after_s(new.job, now)
            raise Exhausted(short, max(wait_s, RETRY_AFTER_S))

    def add_all(self, arrivals: Sequence[Arrival]) -> None:
        """All of them or none: raises as `add` does."""
        added: list[Arrival] = []
        with self._changed:
            try:
                for new in arrivals:
                    self.add(new)
                    added.append(new)
            except RemoraError:
                for new in added:
                    self._scheduler.end(new.job.request_id, self._clock())
                    del self._requests[new.job.request_id]
                    self._fresh.remove(new.answer)
                raise

    def cancel(self, request_id: str) -> bool:
        with self._changed:
            return self._scheduler.cancel(request_id)

    def cancel_using(self, digest: str) -> int:
        """Cancels every request with this adapter; how many."""
        with self._changed:
            using = [r.id for r in self._requests.values() if r.uses(digest)]
            return sum(self._scheduler.cancel(request_id) for request_id in using)

    def withdraw(self, among: Collection[str]) -> tuple[str, ...]:
        """Takes out those that have no row yet; at most Accepted they may still hear. In the order
        of arrival."""
        with self._changed:
            taken = self._scheduler.withdraw(among, self._clock())
            for request_id in taken:
                del self._requests[request_id]
            self._changed.notify_all()
        return taken

    def refuse(self, error: RemoraError) -> None:
        """New requests get `error` from now on."""
        with self._changed:
            self._closed, self.spare.is_open = error, False
            self._scheduler.end_spare()

    def wait_empty(self, timeout_s: float) -> bool:
        """Whether all requests have ended within the time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._scheduler.empty, timeout_s)

    @property
    def load(self) -> tuple[int, int]:
        """Rows that are busy and requests that wait, at one moment: who has just got a row is in
        one of them."""
        with self._changed:
            return self._scheduler.rows_busy, self._scheduler.queued

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
        landed = self._beside.landed(wait=work is None)
        if (work := landed or work) is None:
            spare_s = self.spare.begin(self._changed, self._requests)
            return None if spare_s is None else min(spare_s, self._idle_s())
        if isinstance(work, PrefillChunk) and work is not landed and self._goes_on(work):
            return None
        is_spare = self._of(work)[0].job.is_spare  # all of them, or none
        engine_s = self._compute(work)
        if not is_spare:
            self._metrics.overhead(time.perf_counter() - began - engine_s)
        return None

    def fail_all(self, error: RemoraError, *, broken: bool = False) -> None:
        """Ends everything that is left; `broken`: without asking the engine, which a bug has left
        as nobody knows."""
        if not broken and (begun := self._beside.landed(wait=True)) is not None:
            self._compute(begun)
        self._greet_and_reap()
        for request in list(self._requests.values()):
            self._fail(request, error)
        self.spare.close()

    def end_spare(self) -> None:
        """What nobody waits for gives back all that it holds, now."""
        with self._changed:
            self._scheduler.end_spare()
        self._greet_and_reap()

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
            self._count_end(request, failed=cause is not EndCause.CANCELLED)
            if cause is EndCause.CANCELLED:
                request.answer.finish(FinishReason.CANCELLED, now)
            else:
                request.answer.fail(DeadlineExceeded("the request's deadline has passed"))

    def _fail_unreadable(self) -> None:
        for digest, error in self._bank.take_failures().items():
            for request in self._waiting():
                if request.uses(digest):
                    self._fail(request, error)

    def _admit(self) -> None:
        with self._changed:
            now = self._clock()
            candidates = [self._requests[i] for i in self._scheduler.candidates(now)]
        for request in candidates:
            if not self._scheduler.row_free or not self._has_memory(request):
                return
            try:
                lease = self._bank.acquire(request.wanted)
            except RemoraError as e:
                self._fail(request, e)
                continue
            if lease is not None:
                self._place(request, lease, now)

    def _has_memory(self, request: Request) -> bool:
        """Where there is none and nothing runs that could make room, the request fails."""
        with self._changed:
            running, free = self._scheduler.running(), self._scheduler.free_rows
            short = self._memory.refusal(request.job, running, free)
        if short is not None and not running:
            self._fail(request, Exhausted(short, RETRY_AFTER_S))
        return short is None

    def _place(self, request: Request, lease: Lease, now: float) -> None:
        """Gives it the row that saves most, where memory leaves a choice."""
        keys, scheduler = self._keys(request, lease), self._scheduler
        with self._changed:
            if not self._here(request):  # withdrawn since it was looked at
                self._bank.release(lease)
                return
            free = scheduler.free_rows
            row = self._prefixes.choose_row(keys, request.prompt, free)
            if self._memory.refusal(request.job, scheduler.running(), (row,)) is not None:
                row = self._memory.widest(free)
            scheduler.admit(request.id, now, row)
            self._requests[request.id] = replace(request, lease=lease, keys=keys)
        request.answer.admitted(now)

    def _keys(self, request: Request, lease: Lease) -> PrefixKeys | None:
        """None where every prompt token has to be computed."""
        asked = request.answer.request
        if asked.scoring.prompt_top is not None or isinstance(request.answer, Embedding):
            return None
        parts = zip(lease.digests, lease.mix, lease.starts, strict=True)
        acting = [Acting(d, entry.weight, s) for d, entry, s in parts if s is not None]
        return self._prefixes.keys(asked.share.cache_salt, acting, asked.prompt)

    def _reused(self, work: PrefillChunk) -> bool:
        """Whether tokens of the chunk are there already. Only what follows reused ones can be."""
        request = self._requests[work.request_id]
        with self._changed:
            reused = self._scheduler.reused(request.id)
        if work.again or work.start != reused:
            return False
        try:
            count = self._prefixes.reuse(work.row, request.keys, request.prompt, work.start)
        except RemoraError as e:
            self._prefixes.lost(work.row)
            self._fail(request, e)
            return True
        if count:
            request.answer.cached_tokens = reused + count
            with self._changed:
                self._memory.wrote(work.row, reused + count)
                self._scheduler.reuse(request.id, count)
        return count > 0

    def _goes_on(self, work: PrefillChunk) -> bool:
        """Whether its tokens are there already, or the engine now reads it beside decode steps."""
        if self._reused(work):
            return True
        if not (self._scheduler.any_decodes and self._beside.begin(work, self._of(work)[0])):
            return False
        with self._changed:
            self._scheduler.begin(work)
        return True

    def _prefetch(self) -> None:
        self._bank.prefetch(r.wanted for r in self._waiting() if r.wanted)
        if self._bank.preloading:
            self.end_spare()  # what an operator waits for may need its place
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
            found = self._computing.run(work, requests)
        except RemoraError as e:
            log.warning("engine.step_failed", extra={"rows": len(requests), "error": str(e)})
            for row, request in zip(work.rows, requests, strict=True):
                self._prefixes.lost(row)
                self._fail(request, e)
            return time.perf_counter() - began
        engine_s = time.perf_counter() - began
        self._wrote(work, requests)
        with self._changed:
            self._scheduler.done(work, self._beside.seconds(work, engine_s))
        now = self._clock()
        for request, reason in self._taking.take(requests, found, engine_s, now):
            self._finish(request, reason, now)
        self._read_again(request for request, _ in zip(requests, found, strict=False))
        if isinstance(work, PrefillChunk) and work.last:
            self._end_embedding(requests[0])
        return engine_s

    def _read_again(self, requests: Iterable[Request]) -> None:
        """Those whose next token makes them longer than `limits.switch`: by then all their keys
        have to be of the other kind."""
        switch = self._engine.limits.switch
        with self._changed:
            for request in requests if switch is not None else ():
                if self._here(request) and request.generating.position == switch:
                    self._scheduler.read_again(request.id)
                    keys = request.keys and request.keys.switched()
                    self._requests[request.id] = replace(request, keys=keys)

    def _end_embedding(self, request: Request) -> None:
        """One whose prompt is read is complete."""
        if isinstance(request.answer, Embedding):
            self._finish(request, FinishReason.STOP, self._clock())

    def _wrote(self, work: Work, requests: Sequence[Request]) -> None:
        """What the rows hold after the step."""
        for row, request in zip(work.rows, requests, strict=True):
            if isinstance(work, PrefillChunk):
                self._memory.wrote(row, work.stop)
                self._prefixes.wrote(row, request.keys, request.text, work.stop)
                continue
            valid = request.generating.position + 1
            self._memory.wrote(row, valid)
            if request.keys is not None and self._prefixes.crosses(row, valid):
                self._prefixes.wrote(row, request.keys, request.text, valid)

    def _of(self, work: Work) -> list[Request]:
        return [self._requests[i] for i in work.request_ids]

    def _drafted(self, request_id: str, computed: int, accepted: int) -> None:
        with self._changed:
            self._scheduler.drafted(request_id, computed, accepted)

    def _finish(self, request: Request, reason: FinishReason, now: float) -> None:
        self._end(request)
        self._count_end(request, failed=False)
        request.answer.finish(reason, now)

    def _fail(self, request: Request, error: RemoraError) -> None:
        if self._end(request):
            self._count_end(request, failed=True)
            request.answer.fail(error)

    def _count_end(self, request: Request, *, failed: bool) -> None:
        if not request.job.is_spare:
            self._metrics.ended(failed=failed)

    def _end(self, request: Request) -> bool:
        """Out of bank, scheduler and table before the last event: whoever hears it sees the bank
        without the request and may use its id again. False when it was withdrawn before."""
        self._release(request)
        with self._changed:
            if not self._here(request):
                return False
            self._scheduler.end(request.id, self._clock())
            del self._requests[request.id]
            self._changed.notify_all()
        return True

    def _here(self, request: Request) -> bool:
        known = self._requests.get(request.id)
        return known is not None and known.answer is request.answer

    def _release(self, request: Request) -> None:
        if request.lease is not None:
            self._bank.release(request.lease)

    def _waiting(self) -> list[Request]:
        with self._changed:
            return [self._requests[i] for i in self._scheduler.waiting()]
