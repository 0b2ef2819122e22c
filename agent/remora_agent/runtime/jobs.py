"""What the scheduler knows of a request, and the bounds it works within. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from remora_agent.runtime.api import GenerationRequest

MAX_PRIORITY = 100  # in both directions


@dataclass(frozen=True)
class Job:
    request_id: str
    prompt_tokens: int  # >= 1; the row holds prompt and answer, checked before
    deadline_s: float | None = None
    borders: tuple[int, ...] = ()  # prompt positions that begin a chunk: the mix changes there
    max_new: int = 1  # most tokens of the answer
    priority: int = 0  # higher first
    client: str = ""  # whom its tokens are counted against, within its owner's part
    owner: str = ""  # who is connected
    is_spare: bool = False  # nobody waits for it: it runs alone, and leaves for any other
    slow_from: int | None = None  # of spare work: every token after so many is scored

    @property
    def cost(self) -> int:
        """Most tokens that serving it takes."""
        return self.prompt_tokens + self.max_new


@dataclass(frozen=True)
class SchedulerLimits:
    rows: int
    max_waiting: int
    max_waiting_tokens: int  # sum of the waiting prompts
    prefill_chunk: int  # most prompt tokens between two decode steps
    aging_s: float = 30.0  # so long without a turn is worth one level of priority
    inter_token_s: float = float("inf")  # chunks are cut so that running answers move as often
    spare_s: float = 0.02  # the same for spare work: so long may whoever comes have to wait
    spare_after_s: float = 0.25  # spare work begins when nobody was here for so long


def job_of(request: GenerationRequest, borders: tuple[int, ...]) -> Job:
    return Job(
        request.request_id,
        len(request.prompt),
        request.deadline_s,
        borders,
        request.stopping.max_tokens,
        request.share.priority,
        request.share.client,
        request.share.owner,
    )
