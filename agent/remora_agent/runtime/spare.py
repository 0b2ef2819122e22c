"""Work that nobody waits for: given a row when nothing else has waited or run for a moment, and
only what is there.

It makes no adapter come or go, overwrites no prefix that is not kept elsewhere, takes no memory
below the floor, and leaves at the first request of anybody. Used by the step thread.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition
from typing import Protocol

from remora_agent.bank.bank import Bank
from remora_agent.runtime.api import Failed, GenerationRequest, OnEvent
from remora_agent.runtime.constraint import Grammar
from remora_agent.runtime.jobs import Job
from remora_agent.runtime.memory_floor import RETRY_AFTER_S, MemoryFloor
from remora_agent.runtime.prefix_cache import PrefixCache
from remora_agent.runtime.request import Arrival, Request, spare
from remora_agent.runtime.scheduler import Scheduler
from remora_contract.errors import Exhausted, RemoraError

# A request with its listener and its compiled constraint, when there is one.
SpareRequest = tuple[GenerationRequest, OnEvent, "Grammar | None"]
Arriving = Callable[[GenerationRequest, OnEvent, "Grammar | None"], Arrival]


class SpareSource(Protocol):
    """Whose work it is. All is called by the step thread."""

    def next(self) -> SpareRequest | None:
        """The next piece; None: there is none now. Its listener hears no Accepted, and
        Failed(Exhausted) where there is no room for it."""

    def close(self) -> None:
        """Nothing is computed any more. What ran has heard its end."""


class SpareWork:
    def __init__(
        self,
        bank: Bank,
        scheduler: Scheduler,
        prefixes: PrefixCache,
        memory: MemoryFloor,
        clock: Callable[[], float],
    ) -> None:
        self._bank, self._scheduler = bank, scheduler
        self._prefixes, self._memory = prefixes, memory
        self._clock = clock
        self._source: SpareSource | None = None
        self._arriving: Arriving | None = None
        self.is_open = True  # `lock` of `begin` guards it

    def take_from(self, source: SpareSource, arriving: Arriving) -> None:
        """`arriving` makes an arrival, as of anybody's request; raises as that does."""
        self._source, self._arriving = source, arriving

    def close(self) -> None:
        """Its owner hears that nothing begins any more."""
        source, self._source = self._source, None
        if source is not None:
            source.close()

    def begin(self, lock: Condition, requests: dict[str, Request]) -> float | None:
        """None: there was something to do, begun now or given up; else for how many seconds there
        will be nothing. `lock` guards the scheduler and the table; no listener hears under it."""
        with lock:
            wait_s = self._scheduler.spare_in_s(self._clock())
            is_free = self.is_open and not wait_s
        if self._source is not None and 0 < wait_s < float("inf"):
            return wait_s
        new = self._next() if is_free and not self._bank.preloading else None
        if new is None:
            return float("inf")
        lease, job = self._bank.acquire_resident(new.wanted), new.job
        with lock:
            # Somebody may have come meanwhile.
            fits = lease is not None and self.is_open and self._scheduler.idle
            row = self._row(job) if fits else None
            if row is not None:
                self._scheduler.run_spare(job, row)
                requests[job.request_id] = Request(new.answer, new.wanted, job, lease)
        if row is None:
            if lease is not None:
                self._bank.release(lease)
            new.answer.fail(Exhausted("there is no room beside what people use", RETRY_AFTER_S))
        return None

    def _next(self) -> Arrival | None:
        source, arriving, new = self._source, self._arriving, None
        if source is None or arriving is None:
            return None
        while new is None and (wanted := source.next()) is not None:
            new = _arrived(arriving, wanted)
        return new

    def _row(self, job: Job) -> int | None:
        row = self._prefixes.spare_row(self._scheduler.free_rows)
        if row is None or self._memory.refusal(job, (), (row,)) is not None:
            return None
        return row


def _arrived(arriving: Arriving, wanted: SpareRequest) -> Arrival | None:
    """None where it is refused, as its listener hears."""
    try:
        return spare(arriving(*wanted))
    except RemoraError as e:
        _, hear, _ = wanted
        hear(Failed(e))
        return None
