"""How long a request would wait: from what runs, what goes before it and measured rates. Pure.

Rows are served side by side, but prompts are read one after the other, with decode steps between
the chunks. The estimate plays that out once, with answers as long as they were of late.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remora_agent.runtime.pace import Rates


@dataclass(frozen=True)
class Ahead:
    """What is left of a request: prompt tokens to read and, at most, answer tokens to draw."""

    prompt: int
    answer: int


@dataclass(frozen=True)
class Wait:
    """Seconds from now."""

    row_s: float  # until the request has a row
    first_token_s: float  # until its first token


def estimate(
    running: Sequence[Ahead],
    before: Iterable[Ahead],
    own: Ahead,
    rows: int,
    rates: Rates,
    chunk: int,
) -> Wait:
    """`before` in the order in which they will be admitted; `chunk` tokens are read between two
    decode steps."""
    token_s = rates.token_s * (1 - rates.reused)
    # While others decode, every chunk is followed by one step of theirs.
    shared_s = token_s + rates.step_s / chunk
    read_s = 0.0  # when the engine has read all prompts so far
    free = [0.0] * (rows - len(running))
    for job in running:
        read_s += job.prompt * shared_s
        free.append(read_s * (job.prompt > 0) + _decoding_s(job, rates))
    heapq.heapify(free)
    for job in before:
        read_s = max(heapq.heappop(free), read_s) + job.prompt * shared_s
        heapq.heappush(free, read_s + _decoding_s(job, rates))
    row_s = free[0]
    alone = not running and row_s == 0.0
    own_s = own.prompt * (token_s if alone else shared_s)
    return Wait(row_s, max(row_s, read_s) + own_s)


def _decoding_s(job: Ahead, rates: Rates) -> float:
    return min(job.answer, max(1.0, rates.answer_tokens)) * rates.step_s
