"""Which request computes next: a state machine over counts and times. Pure: the clock comes in as
an argument; it knows nothing of tokens, text, adapters or engines.

A job waits, gets a row, has its prompt read in chunks, then decodes one token a step with all the
others. Chunks alternate with decode steps, so that running answers keep moving while a long prompt
is read. Jobs are admitted in the order of arrival; one that cannot be admitted yet (its adapters
are on the way, or there is no room for them) is passed over, but not for longer than `patience_s`:
then later ones wait for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from remora_contract.errors import Conflict, Exhausted, InternalFault

_SERVICE_S_UNKNOWN = 1.0  # assumed until the first request has ended
_SERVICE_MEMORY = 0.8  # weight of the past in the running mean of service times


@dataclass(frozen=True)
class Job:
    """What the scheduler knows of a request."""

    request_id: str
    prompt_tokens: int  # >= 1; the row holds prompt and answer, checked before
    deadline_s: float | None = None
    borders: tuple[int, ...] = ()  # prompt positions that begin a chunk: the mix changes there


@dataclass(frozen=True)
class SchedulerLimits:
    rows: int
    max_waiting: int
    max_waiting_tokens: int
    prefill_chunk: int
    patience_s: float


@dataclass(frozen=True)
class PrefillChunk:
    request_id: str
    row: int
    start: int
    stop: int
    last: bool  # its logits give the first token


@dataclass(frozen=True)
class DecodeStep:
    request_ids: tuple[str, ...]
    rows: tuple[int, ...]


Work = PrefillChunk | DecodeStep


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
    admitted_s: float
    read: int = 0  # prompt tokens in the cache

    @property
    def decoding(self) -> bool:
        return self.read == self.job.prompt_tokens


@dataclass
class _Waiting:
    job: Job
    passed_over_s: float | None = None  # when a later job was first admitted before it


class Scheduler:
    """Not thread-safe. Every job that enters leaves by `reap` or by `end`, exactly once."""

    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._waiting: dict[str, _Waiting] = {}  # in the order of arrival
        self._running: dict[str, _Running] = {}  # in the order of admission
        self._cancelled: set[str] = set()
        self._free_rows = list(range(limits.rows - 1, -1, -1))
        self._waiting_tokens = 0
        self._decode_next = False
        self._service_s: float | None = None

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def rows_busy(self) -> int:
        return len(self._running)

    @property
    def row_free(self) -> bool:
        return bool(self._free_rows)

    @property
    def empty(self) -> bool:
        return not self._waiting and not self._running

    def submit(self, job: Job, now: float) -> None:
        """Puts it at the end of the queue. Raises Conflict for an id in use, Exhausted when the
        queue is full or the wait would outlast the deadline."""
        if job.request_id in self._waiting or job.request_id in self._running:
            raise Conflict(f"a request with id {job.request_id!r} is running; choose another id")
        wait_s = self.estimated_wait_s()
        if len(self._waiting) >= self._limits.max_waiting:
            raise Exhausted(f"{len(self._waiting)} requests are waiting already", wait_s)
        tokens = self._waiting_tokens + job.prompt_tokens
        if self._waiting and tokens > self._limits.max_waiting_tokens:
            raise Exhausted(
                f"the waiting prompts have {self._waiting_tokens} tokens, and "
                f"{job.prompt_tokens} more pass the limit of {self._limits.max_waiting_tokens}",
                wait_s,
            )
        known = self._service_s is not None
        if known and job.deadline_s is not None and now + wait_s > job.deadline_s:
            raise Exhausted(
                f"the wait is about {wait_s:.1f} s, longer than the request's deadline", wait_s
            )
        self._waiting[job.request_id] = _Waiting(job)
        self._waiting_tokens = tokens

    def estimated_wait_s(self) -> float:
        """Until a request that arrives now would get a row; 0 with a free row and no queue."""
        if self._free_rows and not self._waiting:
            return 0.0
        service_s = _SERVICE_S_UNKNOWN if self._service_s is None else self._service_s
        return service_s * (len(self._waiting) + 1) / self._limits.rows

    def cancel(self, request_id: str) -> bool:
        """Whether it is here; it ends at the next `reap`."""
        known = request_id in self._waiting or request_id in self._running
        if known:
            self._cancelled.add(request_id)
        return known

    def reap(self, now: float) -> tuple[Ended, ...]:
        """Takes out what was cancelled or has passed its deadline."""
        ended = []
        for job in self._jobs():
            if job.request_id in self._cancelled:
                ended.append(Ended(job.request_id, EndCause.CANCELLED))
            elif job.deadline_s is not None and now >= job.deadline_s:
                ended.append(Ended(job.request_id, EndCause.EXPIRED))
        for e in ended:
            self._take_out(e.request_id)
        return tuple(ended)

    def candidates(self, now: float) -> tuple[str, ...]:
        """Waiting requests that may be admitted now, oldest first; try them in this order.

        Ends with the first that was passed over for too long. Empty when no row is free.
        """
        if not self._free_rows:
            return ()
        found = []
        for request_id, waiting in self._waiting.items():
            found.append(request_id)
            since = waiting.passed_over_s
            if since is not None and now - since >= self._limits.patience_s:
                break
        return tuple(found)

    def admit(self, request_id: str, now: float) -> int:
        """Gives a candidate its row. Raises InternalFault when it is none or no row is free."""
        if request_id not in self._waiting or not self._free_rows:
            raise InternalFault(f"request {request_id!r} cannot be admitted")
        for earlier in self._waiting.values():
            if earlier.job.request_id == request_id:
                break
            if earlier.passed_over_s is None:
                earlier.passed_over_s = now
        job = self._waiting.pop(request_id).job
        self._waiting_tokens -= job.prompt_tokens
        row = self._free_rows.pop()
        self._running[request_id] = _Running(job, row, now)
        return row

    def next_work(self) -> Work | None:
        """What to compute now; the same until `read` or `decoded` says that it was done."""
        prefilling = next((r for r in self._running.values() if not r.decoding), None)
        decoding = [r for r in self._running.values() if r.decoding]
        if decoding and (prefilling is None or self._decode_next):
            ids = tuple(r.job.request_id for r in decoding)
            return DecodeStep(ids, tuple(r.row for r in decoding))
        if prefilling is None:
            return None
        start = prefilling.read
        ahead = (b for b in prefilling.job.borders if b > start)
        stop = min(start + self._limits.prefill_chunk, prefilling.job.prompt_tokens, *ahead)
        last = stop == prefilling.job.prompt_tokens
        return PrefillChunk(prefilling.job.request_id, prefilling.row, start, stop, last)

    def done(self, work: Work) -> None:
        """The engine has computed `work`."""
        if isinstance(work, PrefillChunk):
            self._running[work.request_id].read = work.stop
        self._decode_next = isinstance(work, PrefillChunk)

    def end(self, request_id: str, now: float) -> None:
        """The request has finished or failed; its row is free. Raises InternalFault for one that
        is not here."""
        running = self._running.get(request_id)
        if running is not None:
            service_s = now - running.admitted_s
            before = service_s if self._service_s is None else self._service_s
            self._service_s = _SERVICE_MEMORY * before + (1 - _SERVICE_MEMORY) * service_s
        self._take_out(request_id)

    def waiting(self) -> tuple[str, ...]:
        """Oldest first."""
        return tuple(self._waiting)

    def next_deadline_s(self) -> float | None:
        """The earliest of all deadlines."""
        deadlines = (j.deadline_s for j in self._jobs() if j.deadline_s is not None)
        return min(deadlines, default=None)

    def _jobs(self) -> Iterable[Job]:
        yield from (w.job for w in self._waiting.values())
        yield from (r.job for r in self._running.values())

    def _take_out(self, request_id: str) -> None:
        self._cancelled.discard(request_id)
        waiting = self._waiting.pop(request_id, None)
        running = self._running.pop(request_id, None)
        if waiting is not None:
            self._waiting_tokens -= waiting.job.prompt_tokens
        elif running is not None:
            self._free_rows.append(running.row)
        else:
            raise InternalFault(f"request {request_id!r} has ended before")
