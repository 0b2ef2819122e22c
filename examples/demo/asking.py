"""Asks an agent everything, in batches that mix base and adapters, and checks each answer.

Owns the asking and the checking of text and provenance. Knows nothing of rollouts.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from examples.demo.cast import BASE, Cast
from examples.demo.fleet import Agent
from remora_agent.client import Client, Result

ROWS = 8


@dataclass(frozen=True)
class Answered:
    variant: str
    question: str
    result: Result


@dataclass(frozen=True)
class Survey:
    """All answers of one agent. `complaints` is empty when every one is right."""

    answered: tuple[Answered, ...]
    complaints: tuple[str, ...]
    compared_tokens: int
    tokens: int
    seconds: float
    rows_busy: int  # the most seen decoding at once

    def text(self, variant: str, question: str) -> str:
        return next(
            a.result.text for a in self.answered if (a.variant, a.question) == (variant, question)
        )


def survey(agent: Agent, cast: Cast, digests: Mapping[str, str], variants: Sequence[str]) -> Survey:
    """Every question to every variant, ROWS at a time in random order, so that batches mix.

    `digests[variant]` is the adapter digest that must have answered.
    """
    asked = [(v, q) for v in variants for q in cast.questions]
    random.Random(3).shuffle(asked)
    started = time.monotonic()
    with agent.client() as client, _watch_rows(client) as busy, ThreadPoolExecutor(ROWS) as pool:
        answered = tuple(pool.map(lambda pair: ask(client, cast, *pair), asked))
    seconds = time.monotonic() - started
    checks = [cast.oracle.check(a.variant, a.question, a.result) for a in answered]
    wrong = [check.complaint for check in checks if check.complaint]
    wrong += [c for a in answered for c in provenance_complaints(a, digests)]
    return Survey(
        answered=answered,
        complaints=tuple(f"{agent.name}: {complaint}" for complaint in wrong),
        compared_tokens=sum(check.tokens for check in checks),
        tokens=sum(len(a.result.token_ids) for a in answered),
        seconds=seconds,
        rows_busy=max(busy),
    )


def ask(client: Client, cast: Cast, variant: str, question: str) -> Answered:
    result = client.generate(
        cast.prompt(question),
        adapter=cast.adapter_of(variant),
        max_tokens=cast.max_tokens,
        temperature=0.0,
    )
    return Answered(variant, question, result)


def provenance_complaints(answered: Answered, digests: Mapping[str, str]) -> list[str]:
    """Is the answer signed by exactly the adapter it must come from?"""
    found = [a.digest for a in answered.result.provenance.adapters]
    expected = [] if answered.variant == BASE else [digests[answered.variant]]
    if found == expected:
        return []
    return [f"{answered.variant}: {answered.question!r} was answered by {found}, not {expected}"]


@contextmanager
def _watch_rows(client: Client) -> Iterator[list[int]]:
    """Samples how many rows decode, until the block ends."""
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            seen.append(client.status().rows_busy)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()
