"""The queue: who waits, in which order they get rows, and when it is full. Pure.

The order is by level, then by the owner's virtual time, within an owner by the client's, then by
arrival. A request's level is its priority and one more for every `aging_s` that it has waited as
the first of its owner and priority, or after it was passed over; so whoever is first of his own
reaches every level in the end, and one owner's crowd does not age together, whatever clients it
names. Of one client and priority the order is that of arrival.

A client may hold three quarters of the queue at most, all of one owner seven eighths: the rest is
for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass

from remora_agent.runtime.fair_share import NestedShare
from remora_agent.runtime.jobs import Job, SchedulerLimits

Flow = tuple[str, int]  # owner, priority


@dataclass
class _Entry:
    job: Job
    aging_since_s: float | None = None  # None: others of its flow are before it

    @property
    def flow(self) -> Flow:
        return (self.job.owner, self.job.priority)


class WaitingJobs:
    def __init__(self, limits: SchedulerLimits) -> None:
        self._limits = limits
        self._entries: dict[str, _Entry] = {}  # in the order of arrival
        self._flows: dict[Flow, dict[str, _Entry]] = {}  # the same, by flow
        self._tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Job]:
        """In the order of arrival."""
        return (entry.job for entry in self._entries.values())

    def refusal(self, job: Job) -> str | None:
        """Why there is no place for it, None when there is."""
        limits = self._limits
        if len(self._entries) >= limits.max_waiting:
            return f"{len(self._entries)} requests are waiting already"
        if self._entries and self._tokens + job.prompt_tokens > limits.max_waiting_tokens:
            return (
                f"the waiting prompts have {self._tokens} tokens, and {job.prompt_tokens} more "
                f"pass the limit of {limits.max_waiting_tokens}"
            )
        return self._crowding(job)

    def _crowding(self, job: Job) -> str | None:
        """Why its owner or its client may not have one more."""
        limits = self._limits
        of_owner = [e.job for e in self._entries.values() if e.job.owner == job.owner]
        of_client = [j for j in of_owner if j.client == job.client]
        for who, own, spared in (("client", of_client, 4), ("connection", of_owner, 8)):
            tokens = sum(j.prompt_tokens for j in own) + job.prompt_tokens
            places = _without_part(limits.max_waiting, spared)
            most = _without_part(limits.max_waiting_tokens, spared)
            if len(own) >= places or (own and tokens > most):
                return (
                    f"{len(own)} requests of this {who} are waiting already, and the rest of the "
                    "queue is kept for others"
                )
        return None

    def push(self, job: Job, now: float) -> None:
        entry = _Entry(job)
        flow = self._flows.setdefault(entry.flow, {})
        if not flow:
            entry.aging_since_s = now
        flow[job.request_id] = self._entries[job.request_id] = entry
        self._tokens += job.prompt_tokens

    def take(self, request_id: str, now: float) -> Job | None:
        """Out of the queue, for whatever reason; None when it is not here."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        self._tokens -= entry.job.prompt_tokens
        flow = self._flows[entry.flow]
        del flow[request_id]
        first = next(iter(flow.values()), None)
        if first is None:
            del self._flows[entry.flow]
        elif first.aging_since_s is None:
            first.aging_since_s = now
        return entry.job

    def pass_over(self, order: tuple[str, ...], admitted: str, now: float) -> None:
        """`admitted` got a row; whoever is before it in `order` was passed over."""
        for request_id in order:
            if request_id == admitted:
                return
            entry = self._entries[request_id]
            if entry.aging_since_s is None:
                entry.aging_since_s = now

    def order(self, share: NestedShare, now: float) -> tuple[str, ...]:
        return tuple(job.request_id for job in self._ordered(self._entries.values(), share, now))

    def before(self, job: Job, share: NestedShare, now: float) -> list[Job]:
        """What would be admitted before a job that arrives now, in order."""
        entries = [*self._entries.values(), _Entry(job)]
        ordered = self._ordered(entries, share, now)
        return ordered[: ordered.index(job)]

    def _ordered(self, entries: Iterable[_Entry], share: NestedShare, now: float) -> list[Job]:
        """First the order within each owner, then that of owners, each with what those before it
        will have taken."""
        levels = [(-self._level(entry, now), entry.job) for entry in entries]
        clients = _tagged(levels, lambda j: share.client_start(j.owner, j.client), _client)
        owners = _tagged(clients, lambda j: share.owner_start(j.owner), _owner)
        return [job for _, job in owners]

    def _level(self, entry: _Entry, now: float) -> int:
        since = entry.aging_since_s
        aged = 0 if since is None else max(0, int((now - since) / self._limits.aging_s))
        return entry.job.priority + aged


def _client(job: Job) -> Hashable:
    return (job.owner, job.client, job.priority)


def _owner(job: Job) -> Hashable:
    return (job.owner, job.priority)


def _tagged(
    jobs: list[tuple[int, Job]], start: Callable[[Job], float], of: Callable[[Job], Hashable]
) -> list[tuple[int, Job]]:
    """By level, then by the virtual time of whom each is `of` when its turn comes, then as they
    are."""
    tags: dict[Hashable, float] = {}
    keyed = []
    for number, (level, job) in enumerate(jobs):
        who = of(job)
        tag = tags[who] if who in tags else start(job)
        tags[who] = tag + job.cost
        keyed.append((level, tag, number, job))
    keyed.sort(key=lambda key: key[:3])
    return [(level, job) for level, _, _, job in keyed]


def _without_part(whole: int, parts: int) -> int:
    return whole - whole // parts
