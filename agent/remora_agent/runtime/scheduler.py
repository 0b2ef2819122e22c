"""Which request computes next: a state machine over counts and times. Pure: the clock comes in as
an argument; it knows nothing of tokens, text, adapters or engines.

A job waits, gets a row, has its prompt read in chunks, then decodes one token a step with all the
others. Chunks alternate with decode steps, and are cut by what they take, so that running answers
keep their pace while a long prompt is read; or a chunk is begun and steps go on beside it, where
the engine can. Who gets a row is `waiting`'s order; a job that cannot
be admitted yet (its adapters are on the way, or there is no room for them) is passed over; that it
gets its turn is the bank's affair, which alone can give it without holding up the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum

from remora_agent.runtime.estimate import Ahead, Wait, estimate
from remora_agent.runtime.fair_share import NestedShare
from remora_agent.runtime.jobs import Job, SchedulerLimits
from remora_agent.runtime.pace import LEAST_CHUNK, Pace, Rates
from remora_agent.runtime.waiting import WaitingJobs
from remora_agent.runtime.work import DecodeStep, PrefillChunk, Work
from remora_contract.errors import Conflict, Exhausted, InternalFault

_RETRY_UNKNOWN_S = 1.0  # until speeds were measured
_RETRY_LEAST_S = 0.1


class EndCause(Enum):
    CANCELLED = "cancelled"
    EXPIRED = "expired"


@dataclass(frozen=True)
class Ended:
    request_id: str
    cause: EndCause


@dataclass
class _Running:
    job: Job
    row: int
    text: int  # tokens to read: the prompt's; of one that is read again the answer's too
    read: int = 0  # of them in the cache
    reused: int = 0  # of them not computed
    drawn: int = 0  # tokens of the answer
    in_vain: int = 0  # tokens computed for nothing: guessed and not drawn, or read again

    @property
    def decoding(self) -> bool:
        return self.read == self.text

    @property
    def again(self) -> bool:
        return self.text > self.job.prompt_tokens

    @property
    def left(self) -> Ahead:
        job = self.job
        return Ahead(self.text - self.read, max(1, job.max_new - self.drawn))


class Scheduler:
    """Not thread-safe. Every job that enters leaves by `reap`, by `end` or by `withdraw`, exactly
    once."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._waiting = WaitingJobs(limits)
        self._running: dict[str, _Running] = {}  # in the order of admission
        self._cancelled: set[str] = set()
        self._free_rows = list(range(limits.rows - 1, -1, -1))
        self._left_s: float | None = None  # when somebody's request ended last
        self._decode_next = False
        self._begun: PrefillChunk | None = None  # beside decode steps
        self._share = NestedShare()
        self._pace = Pace(limits.prefill_chunk)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def rows_busy(self) -> int:
        """By those that somebody waits for."""
        return len(self._real())

    @property
    def row_free(self) -> bool:
        return bool(self._free_rows)

    @property
    def free_rows(self) -> tuple[int, ...]:
        """The one that became free last comes last."""
        return tuple(self._free_rows)

    @property
    def empty(self) -> bool:
        """But for spare work."""
        return not self._waiting and not self._real()

    def submit(self, job: Job, now: float, *, begun: bool = False) -> None:
        """Puts it into the queue; spare work leaves for it. Raises Conflict for an id in use, and,
        unless it is a part of what has `begun`, Exhausted when the queue is full or the first token
        would come after the deadline."""
        if job.request_id in self._waiting or job.request_id in self._running:
            raise Conflict(f"a request with id {job.request_id!r} is running; choose another id")
        self.end_spare()
        if not begun:
            self._check_wait(job, now)
        self._share.enter(job.owner, job.client)
        self._waiting.push(job, now)

    def _check_wait(self, job: Job, now: float) -> None:
        full = self._waiting.refusal(job)
        if full is not None:
            raise Exhausted(full, self.retry_after_s(job, now))
        if job.deadline_s is not None:
            wait = self.expected_wait(job, now)
            if wait is not None and now + wait.first_token_s > job.deadline_s:
                raise Exhausted(
                    f"the first token is expected in about {wait.first_token_s:.1f} s, after the "
                    "request's deadline; send it again later or with more time",
                    max(wait.row_s, _RETRY_LEAST_S),
                )

    def expected_wait(self, job: Job, now: float) -> Wait | None:
        """Of a request that arrives now; None while nothing was measured."""
        rates = self._pace.rates
        if rates is None:
            return None
        running = [r.left for r in self._real()]
        own = Ahead(job.prompt_tokens, job.max_new)
        waiting = self._waiting.before(job, self._share, now)
        before = [Ahead(j.prompt_tokens, j.max_new) for j in waiting]
        return estimate(running, before, own, self._limits.rows, rates, self._limits.prefill_chunk)

    def retry_after_s(self, job: Job, now: float) -> float:
        """When it is worth trying again to get it in."""
        wait = self.expected_wait(job, now)
        return _RETRY_UNKNOWN_S if wait is None else max(wait.row_s, _RETRY_LEAST_S)

    def cancel(self, request_id: str) -> bool:
        """Whether it is here; it ends at the next `reap`."""
        known = request_id in self._waiting or request_id in self._running
        if known:
            self._cancelled.add(request_id)
        return known

    def reap(self, now: float) -> tuple[Ended, ...]:
        """Takes out what was cancelled or has passed its deadline, but a chunk that was begun."""
        ended = []
        for job in self._jobs():
            if self._is_begun(job.request_id):
                continue  # the engine writes to its row still
            if job.request_id in self._cancelled:
                ended.append(Ended(job.request_id, EndCause.CANCELLED))
            elif job.deadline_s is not None and now >= job.deadline_s:
                ended.append(Ended(job.request_id, EndCause.EXPIRED))
        for e in ended:
            self._take_out(e.request_id, now)
        return tuple(ended)

    def candidates(self, now: float) -> tuple[str, ...]:
        """Waiting requests that may be admitted now; try them in this order. Empty when no row is
        free."""
        return self._waiting.order(self._share, now) if self._free_rows else ()

    def admit(self, request_id: str, now: float, row: int | None = None) -> int:
        """Gives a candidate a row: the given one or any. Raises InternalFault when it is none or
        the row is not free."""
        if request_id not in self._waiting or not self._free_rows:
            raise InternalFault(f"request {request_id!r} cannot be admitted")
        row = self._free_rows[-1] if row is None else row
        if row not in self._free_rows:
            raise InternalFault(f"row {row} is not free for request {request_id!r}")
        self._waiting.pass_over(self._waiting.order(self._share, now), request_id, now)
        job = self._waiting.take(request_id, now)
        assert job is not None  # looked up above
        self._free_rows.remove(row)
        self._share.charge(job.owner, job.client, job.cost)
        self._running[request_id] = _Running(job, row, job.prompt_tokens)
        return row

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs, spare or not."""
        return not self._waiting and not self._running

    def spare_in_s(self, now: float) -> float:
        """When spare work may begin; infinite while anything waits or runs. Whoever has just left
        often comes back at once."""
        if not self.idle:
            return float("inf")
        if self._left_s is None:
            return 0.0
        return max(0.0, self._left_s + self._limits.spare_after_s - now)

    def run_spare(self, job: Job, row: int) -> None:
        """Gives a free row to work that nobody waits for. Raises InternalFault unless `idle`."""
        if not self.idle or not job.is_spare:
            raise InternalFault(f"spare work {job.request_id!r} cannot run now")
        self._free_rows.remove(row)
        self._running[job.request_id] = _Running(job, row, job.prompt_tokens)

    def end_spare(self) -> None:
        """What nobody waits for is not computed from now on, and ends at the next `reap`."""
        self._cancelled |= {r.job.request_id for r in self._running.values() if r.job.is_spare}

    def next_work(self) -> Work | None:
        """What to compute now; the same until `done` or `reuse` says that it was done. None also
        where there is nothing beside the chunk that was begun. Spare work that is to leave is not
        computed any more: all of a step is spare, or nothing of it."""
        decoding = [r for r in self._active() if r.decoding]
        prefilling = None if self._begun is not None else self._prefilling()
        if decoding and (prefilling is None or self._decode_next):
            ids = tuple(r.job.request_id for r in decoding)
            return DecodeStep(ids, tuple(r.row for r in decoding))
        if prefilling is None:
            return None
        stop = self._stop(prefilling, bool(decoding))
        start, last = prefilling.read, stop == prefilling.text
        request_id, row = prefilling.job.request_id, prefilling.row
        return PrefillChunk(request_id, row, start, stop, last, prefilling.again)

    @property
    def any_decodes(self) -> bool:
        return any(r.decoding for r in self._active())

    def begin(self, work: PrefillChunk) -> None:
        """The engine computes `work` beside what `next_work` says from now on, until `done`. Raises
        InternalFault while it has begun another."""
        if self._begun is not None:
            raise InternalFault(f"a chunk of request {self._begun.request_id!r} is not done")
        self._begun = work

    def _is_begun(self, request_id: str) -> bool:
        return self._begun is not None and self._begun.request_id == request_id

    def reuse(self, request_id: str, tokens: int) -> None:
        """The next `tokens` of its prompt are in its row without having been computed. Raises
        InternalFault unless at least one is left to read."""
        running = self._running[request_id]
        if not 0 < tokens < running.job.prompt_tokens - running.read:
            raise InternalFault(f"{tokens} tokens of request {request_id!r} cannot be reused")
        running.read += tokens
        running.reused += tokens
        self._decode_next = True

    def read_again(self, request_id: str) -> None:
        """What its row holds is of no use any more: prompt and answer are read from the start, and
        that gives the next token. Raises InternalFault unless it decodes."""
        running = self._running[request_id]
        if not running.decoding:
            raise InternalFault(f"request {request_id!r} has not read its prompt")
        running.in_vain += running.read
        running.text = running.job.prompt_tokens + running.drawn
        running.read = 0

    def done(self, work: Work, seconds: float | None = None) -> None:
        """The engine has computed `work`, in so many seconds when they were measured."""
        if isinstance(work, PrefillChunk):
            running = self._running[work.request_id]
            running.read = work.stop
            running.drawn += work.last
            if running.job.is_spare:
                return  # what it takes says nothing of what people wait for
            if work.last and not work.again:
                self._pace.reused(running.reused, running.job.prompt_tokens)
            if seconds is not None:
                self._pace.chunk_took(work.stop - work.start, seconds)
        else:
            for request_id in work.request_ids:
                self._running[request_id].drawn += 1
            if self._running[work.request_ids[0]].job.is_spare:
                return
            if seconds is not None:
                self._pace.step_took(seconds)
        was_begun, self._begun = work is self._begun, None if work is self._begun else self._begun
        if not was_begun and self._begun is None:
            self._decode_next = isinstance(work, PrefillChunk)
        elif was_begun:
            self._decode_next = False  # steps went on meanwhile: the next chunk is begun at once

    def drafted(self, request_id: str, computed: int, accepted: int) -> None:
        """In the step that was done last, so many tokens were computed beside its own, and so many
        of them drawn."""
        running = self._running[request_id]
        running.drawn += accepted
        running.in_vain += computed - accepted

    def end(self, request_id: str, now: float) -> None:
        """The request has finished or failed; its row is free. Raises InternalFault for one that
        is not here."""
        running = self._running.get(request_id)
        if running is not None and running.drawn and not running.job.is_spare:
            self._pace.answered(running.drawn)
        self._take_out(request_id, now)

    def withdraw(self, among: Collection[str], now: float) -> tuple[str, ...]:
        """Takes out those of `among` that wait, in the order of arrival, but what was cancelled."""
        here = (job.request_id for job in self._waiting)
        taken = [i for i in here if i in among and i not in self._cancelled]
        for request_id in taken:
            self._take_out(request_id, now)
        return tuple(taken)

    def waiting(self) -> tuple[str, ...]:
        """Oldest first."""
        return tuple(job.request_id for job in self._waiting)

    def running(self) -> tuple[tuple[int, Job], ...]:
        """Row and job of each that has a row, but for spare work."""
        return tuple((r.row, r.job) for r in self._real())

    def reused(self, request_id: str) -> int:
        """Prompt tokens that were not computed."""
        return self._running[request_id].reused

    def next_deadline_s(self) -> float | None:
        """The earliest of all deadlines."""
        deadlines = (j.deadline_s for j in self._jobs() if j.deadline_s is not None)
        return min(deadlines, default=None)

    @property
    def rates(self) -> Rates | None:
        return self._pace.rates

    def _prefilling(self) -> _Running | None:
        """Whose prompt is read now: the first admitted."""
        return next((r for r in self._active() if not r.decoding), None)

    def _real(self) -> list[_Running]:
        return [r for r in self._running.values() if not r.job.is_spare]

    def _active(self) -> list[_Running]:
        running = self._running.values()
        return [r for r in running if not (r.job.is_spare and r.job.request_id in self._cancelled)]

    def _stop(self, running: _Running, others_decode: bool) -> int:
        """Where the next chunk ends: at a multiple of its size, at a border or with the prompt, so
        that equal prompts are cut alike wherever their reading begins."""
        size = self._limits.prefill_chunk
        slow_from = running.job.slow_from
        if slow_from is not None and running.read >= slow_from:
            size = LEAST_CHUNK  # what scores take was never measured
        elif running.job.is_spare:
            size = self._pace.chunk(self._limits.spare_s)
        elif others_decode:
            size = self._pace.chunk(self._limits.inter_token_s)
        start = running.read
        ahead = (b for b in running.job.borders if b > start)
        return min((start // size + 1) * size, running.text, *ahead)

    def _jobs(self) -> Iterable[Job]:
        yield from self._waiting
        yield from (r.job for r in self._running.values())

    def _take_out(self, request_id: str, now: float) -> None:
        self._cancelled.discard(request_id)
        if self._is_begun(request_id):
            self._begun = None
        job = self._waiting.take(request_id, now)
        running = self._running.pop(request_id, None)
        if running is not None:
            job = running.job
            self._free_rows.append(running.row)
            if job.is_spare:
                return
            served = running.read - running.reused + running.drawn + running.in_vain
            self._share.charge(job.owner, job.client, served - job.cost)
        if job is None:
            raise InternalFault(f"request {request_id!r} has ended before")
        self._left_s = now
        self._share.leave(job.owner, job.client)
