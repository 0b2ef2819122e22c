"""Clients that stream from every agent without a pause, while something changes underneath.

Owns the load and its judgement: no failure, one digest behind each answer, the text that digest
must give, and never the old one again after the new one has answered.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from examples.demo.asking import Answered
from examples.demo.cast import BASE, Cast
from examples.demo.fleet import Agent
from remora_agent.client import Client
from remora_contract.errors import RemoraError

STREAMS = 2  # clients at each agent
FAILED, UNKNOWN = "(failed)", "(unknown)"


@dataclass(frozen=True)
class Request:
    agent: str
    asked: str  # the adapter's name, or BASE
    question: str
    started_s: float
    ended_s: float
    answered: Answered | None
    error: str | None


@dataclass
class Traffic:
    """As a context manager: streams run from its entry to its exit."""

    agents: Sequence[Agent]
    cast: Cast
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Traffic:
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._stream, args=(agent, number), daemon=True)
            for agent in self.agents
            for number in range(STREAMS)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _stream(self, agent: Agent, number: int) -> None:
        # The adapter that changes is asked for twice as often as the others.
        names = (self.cast.second, self.cast.first, self.cast.second, BASE)
        pairs = zip(
            itertools.islice(itertools.cycle(names), number, None),
            itertools.islice(itertools.cycle(self.cast.questions), 7 * number, None),
            strict=False,
        )
        with agent.client() as client:
            for name, question in pairs:
                if self._stop.is_set():
                    return
                self.requests.append(_request(client, agent.name, self.cast, name, question))


def _request(client: Client, agent: str, cast: Cast, name: str, question: str) -> Request:
    started = time.monotonic()
    answered, error = None, None
    adapter = None if name == BASE else name
    try:
        with client.stream(
            cast.prompt(question), adapter=adapter, max_tokens=cast.max_tokens, temperature=0.0
        ) as stream:
            for _ in stream:
                pass
            answered = Answered(name, question, stream.result)
    except RemoraError as e:
        error = f"{type(e).__name__}: {e}"
    return Request(agent, name, question, started, time.monotonic(), answered, error)


@dataclass(frozen=True)
class Verdict:
    complaints: tuple[str, ...]
    answered_by: Mapping[str, int]  # variant -> answers
    tokens: int
    seconds: float
    median_s: float  # of one request
    slowest_s: float

    @property
    def requests(self) -> int:
        return sum(self.answered_by.values())


def judge(requests: Sequence[Request], cast: Cast, digests: Mapping[str, str]) -> Verdict:
    """`digests[variant]`: which bytes stand behind it, for both revisions of what changed."""
    ordered = sorted(requests, key=lambda r: r.ended_s)
    named = [(r, _variant(r, digests)) for r in ordered]
    complaints = [c for r, variant in named for c in _complaints(r, variant, cast, digests)]
    spans = [r.ended_s - r.started_s for r in ordered]
    return Verdict(
        complaints=tuple(complaints + _stale(named, cast)),
        answered_by=Counter(variant for _, variant in named),
        tokens=sum(len(r.answered.result.token_ids) for r in ordered if r.answered),
        seconds=ordered[-1].ended_s - min(r.started_s for r in ordered),
        median_s=statistics.median(spans),
        slowest_s=max(spans),
    )


def _variant(request: Request, digests: Mapping[str, str]) -> str:
    """Whose bytes answered, by the digests in the final event; UNKNOWN unless exactly one did."""
    if request.answered is None:
        return FAILED
    found = [a.digest for a in request.answered.result.provenance.adapters]
    if request.asked == BASE and not found:
        return BASE
    return next((v for v, d in digests.items() if [d] == found and _is_of(v, request)), UNKNOWN)


def _is_of(variant: str, request: Request) -> bool:
    return variant.partition("-")[0] == request.asked


def _complaints(
    request: Request, variant: str, cast: Cast, digests: Mapping[str, str]
) -> list[str]:
    where = f"{request.agent}: {request.question!r}"
    if request.answered is None:
        return [f"{where} failed: {request.error}"]
    if variant == UNKNOWN:
        found = request.answered.result.provenance.adapters
        return [f"{where} to {request.asked} was answered by {found}"]
    check = cast.oracle.check(variant, request.question, request.answered.result)
    return [f"{request.agent}: {check.complaint}"] if check.complaint else []


def _stale(named: Sequence[tuple[Request, str]], cast: Cast) -> list[str]:
    """Old answers to requests that began after the same agent had given a new one."""
    complaints, first_new = [], dict[str, float]()
    for request, variant in named:
        if variant == f"{cast.second}-2":
            first_new.setdefault(request.agent, request.ended_s)
        elif variant == f"{cast.second}-1" and request.started_s > first_new.get(
            request.agent, request.started_s
        ):
            complaints.append(f"{request.agent}: the old revision answered after the new one had")
    return complaints
