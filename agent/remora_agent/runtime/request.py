"""A request before and after it is queued, with all that its steps need. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from remora_agent.bank.bank import Lease, Wanted
from remora_agent.engine.protocol import Mix
from remora_agent.runtime.answer import Answer
from remora_agent.runtime.embedding import Embedding
from remora_agent.runtime.jobs import Job
from remora_agent.runtime.prefix_keys import PrefixKeys
from remora_contract.errors import InternalFault


@dataclass(frozen=True)
class Arrival:
    """A request on its way into the queue."""

    answer: Answer | Embedding
    wanted: tuple[Wanted, ...]
    job: Job


def spare(arrival: Arrival) -> Arrival:
    """The same as work that nobody waits for."""
    job, scored_from = (
        replace(arrival.job, is_spare=True),
        arrival.answer.request.scoring.prompt_from,
    )
    if scored_from is not None:
        before = scored_from - 1  # whose logits score the first
        borders = tuple(sorted({*job.borders, before}))
        job = replace(job, borders=borders, slow_from=before)
    return replace(arrival, job=job)


@dataclass(frozen=True)
class Request:
    answer: Answer | Embedding
    wanted: tuple[Wanted, ...]
    job: Job
    lease: Lease | None = None  # from admission on
    keys: PrefixKeys | None = None  # the same; None: its prefix is not shared

    def mix_at(self, position: int) -> Mix:
        return self.lease.mix_at(position) if self.lease is not None else ()

    @property
    def generating(self) -> Answer:
        """The answer of a request that decodes."""
        if isinstance(self.answer, Embedding):
            raise InternalFault(f"request {self.id!r} generates nothing")
        return self.answer

    @property
    def id(self) -> str:
        return self.answer.request.request_id

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.answer.request.prompt

    @property
    def text(self) -> tuple[int, ...]:
        """The prompt and what was answered so far."""
        said = () if isinstance(self.answer, Embedding) else self.answer.tokens
        return (*self.prompt, *said) if said else self.prompt

    def uses(self, digest: str) -> bool:
        return any(w.adapter.digest == digest for w in self.wanted)
