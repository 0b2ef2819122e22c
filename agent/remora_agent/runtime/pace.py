"""How fast the engine is, from what its steps took, and how long a chunk may be so that running
answers keep their pace. Pure: seconds come in as arguments.

A chunk's time is remembered by its size, in steps of a factor of two, because a small chunk costs
more a token than a large one. Times change, with the length of what was read before and with what
else the machine does, so the last chunk has its say about all sizes: a larger one takes at most as
much a token, whatever it took before; a smaller one at least as much.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_CHUNK = 16
_MEMORY = 0.6  # weight of the past in a running mean


@dataclass(frozen=True)
class Rates:
    """Seconds, as of late."""

    token_s: float  # of reading one prompt token
    step_s: float  # of one decode step
    answer_tokens: float  # of an answer
    reused: float  # part of the prompts that was not read because it was cached, 0..1


class Pace:
    def __init__(self, largest: int) -> None:
        """`largest`: most tokens of a chunk."""
        self._largest = largest
        self._chunk_s: dict[int, float] = {}  # by size
        self._last: tuple[int, float] | None = None  # size and seconds of the last chunk
        self._read_s = self._read_tokens = 0.0  # sums in which the past fades
        self._step_s: float | None = None
        self._answer_tokens: float | None = None
        self._reused = 0.0

    def chunk_took(self, tokens: int, seconds: float) -> None:
        size = _size(tokens)
        full_s = seconds * size / tokens
        before = self._chunk_s.get(size, 0.0)
        self._chunk_s[size] = full_s if full_s > before else _mean(before, full_s)
        self._last = (size, full_s)
        # Sums, so that a chunk of one token does not speak for long ones.
        self._read_s = _MEMORY * self._read_s + seconds
        self._read_tokens = _MEMORY * self._read_tokens + tokens

    def step_took(self, seconds: float) -> None:
        self._step_s = _mean(self._step_s, seconds)

    def answered(self, tokens: int) -> None:
        """A request ended by itself after so many tokens."""
        self._answer_tokens = _mean(self._answer_tokens, tokens)

    def reused(self, tokens: int, of: int) -> None:
        """A prompt of `of` tokens began with `tokens` cached ones."""
        self._reused = _mean(self._reused, tokens / of)

    @property
    def rates(self) -> Rates | None:
        """None until a prompt was read and an answer has ended."""
        if not self._read_tokens or self._answer_tokens is None:
            return None
        token_s = self._read_s / self._read_tokens
        step_s = token_s if self._step_s is None else self._step_s
        return Rates(token_s, step_s, self._answer_tokens, self._reused)

    def chunk(self, bound_s: float) -> int:
        """Most tokens of a chunk after which, and after a decode step, `bound_s` have not passed;
        at least LEAST_CHUNK, whatever it takes. Where steps alone take longer, chunks take as long
        as steps, so that prompts are still read."""
        step_s = self._step_s or 0.0
        left = bound_s - step_s if step_s < bound_s else step_s
        if left == float("inf"):
            return self._largest
        chosen = size = LEAST_CHUNK
        while size < self._largest:
            size *= 2
            if self._expected_s(size) <= left:
                chosen = size
        return min(chosen, self._largest)

    def _expected_s(self, size: int) -> float:
        """Infinite while nothing was measured."""
        if self._last is None:
            return float("inf")
        last, seconds = self._last
        proportional = seconds * size / last
        if size >= last:
            return min(self._chunk_s.get(size, proportional), proportional)
        return max(self._chunk_s.get(size, proportional), proportional)


def _size(tokens: int) -> int:
    """The smallest LEAST_CHUNK * 2^i that holds so many."""
    size = LEAST_CHUNK
    while size < tokens:
        size *= 2
    return size


def _mean(before: float | None, now: float) -> float:
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now
