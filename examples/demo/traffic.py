"""Clients that stream from every agent without a pause, while something changes underneath.

Owns the load and its judgement: no failure, one digest behind each answer, the text that digest
must give, and never the old one again after the new one has answered.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from examples.demo.asking import Answered, provenance_complaints
from examples.demo.cast import BASE, Cast
from examples.demo.fleet import Agent
from remora_agent.client import Client
from remora_contract.errors import RemoraError

STREAMS = 2  # clients at each agent


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
    """`digests[variant]` for both revisions of the adapter that changed."""
    variants = {digest: variant for variant, digest in digests.items()}
    complaints: list[str] = []
    counts: dict[str, int] = {}
    first_new: dict[str, float] = {}
    tokens = 0
    for request in sorted(requests, key=lambda r: r.ended_s):
        if request.answered is None:
            complaints.append(f"{request.agent}: {request.question!r} failed: {request.error}")
            continue
        result = request.answered.result
        found = [a.digest for a in result.provenance.adapters]
        variant = BASE if request.asked == BASE else variants.get("".join(found), request.asked)
        counts[variant] = counts.get(variant, 0) + 1
        tokens += len(result.token_ids)
        complaints += _complaints(request, variant, cast, digests)
        if variant == f"{cast.second}-2":
            first_new.setdefault(request.agent, request.ended_s)
        elif request.asked == cast.second and request.started_s > first_new.get(
            request.agent, request.started_s
        ):
            complaints.append(f"{request.agent}: the old revision answered after the new one had")
    spans = [r.ended_s - r.started_s for r in requests]
    whole = max(r.ended_s for r in requests) - min(r.started_s for r in requests)
    return Verdict(tuple(complaints), counts, tokens, whole, statistics.median(spans), max(spans))


def _complaints(
    request: Request, variant: str, cast: Cast, digests: Mapping[str, str]
) -> list[str]:
    assert request.answered is not None
    named = Answered(variant, request.question, request.answered.result)
    if variant not in digests and variant != BASE:
        return [f"{request.agent}: {request.question!r}: no known revision of {variant} answered"]
    check = cast.oracle.check(variant, request.question, named.result)
    found = [c for c in (check.complaint,) if c] + provenance_complaints(named, digests)
    return [f"{request.agent}: {complaint}" for complaint in found]
