"""An engine in plain numpy that obeys engine/protocol.py to the letter and checks its caller.

A recurrent toy model: h_t = tanh(R h_{t-1} + E[token] + sum_i weight_i v(adapter_i)), logits =
4 U h. In a sequence longer than `switch` the embedding is another one, from its first token on.
Every past token and the mix it was read with change every later logit, so a row, position
or mix mixed up anywhere shows in the tokens. `solo` is the answer a request must get whatever else
runs.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import EngineLimits, KvBlock, Mix, RowStep
from remora_contract.digests import digest_bytes
from remora_contract.errors import EngineFault, Exhausted, NotFound, PromptTooLong, Unavailable
from remora_contract.targets import AdapterTarget

HIDDEN = 24


def make_weights(name: str, rank: int = 4, width: int = 8) -> AdapterWeights:
    """Small weights whose digest is that of the name."""
    a, b = np.ones((width, rank), np.float32), np.ones((rank, width), np.float32)
    return AdapterWeights(digest_bytes(name.encode()), {AdapterTarget(0, "q"): (a, b)})


@dataclass
class Calls:
    prefills: list[tuple[int, int, int]] = field(default_factory=list)  # row, start, tokens
    decodes: list[tuple[int, ...]] = field(default_factory=list)  # rows
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # row, start, tokens
    scores: list[tuple[int, int, int]] = field(default_factory=list)  # row, start, tokens
    embeds: list[tuple[int, int, int]] = field(default_factory=list)  # row, start, tokens
    adds: list[str] = field(default_factory=list)
    removes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Block(KvBlock):
    long: np.ndarray  # which kind each state is of; a real engine's keys say it themselves


class ReferenceEngine:
    """Raises AssertionError when the caller breaks the protocol: two threads, a wrong position,
    a row twice in a step, an adapter removed while a row still uses it is seen as NotFound."""

    def __init__(
        self,
        rows: int = 4,
        context: int = 64,
        vocab: int = 64,
        max_bank_rank: int = 16,
        scored: int = 16,
        copies_kv: bool = True,
        switch: int | None = None,
    ) -> None:
        random = np.random.default_rng(7)
        self._limits = EngineLimits(
            rows,
            context,
            vocab,
            max_bank_rank,
            scored,
            HIDDEN,
            8 * HIDDEN,
            copies_kv,
            switch=switch,
        )
        # Chaotic on purpose: a difference far back does not fade.
        self._recur = 1.8 * random.standard_normal((HIDDEN, HIDDEN)) / np.sqrt(HIDDEN)
        self._embed = random.standard_normal((vocab, HIDDEN))
        self._head = random.standard_normal((vocab, HIDDEN))
        self._states = np.zeros((rows, context, HIDDEN))
        self._long = np.zeros((rows, context), bool)  # which kind each state is of
        self._held = [0] * rows
        self._scored_from = [context] * rows  # positions after it may be taken back
        self._adapters: dict[int, AdapterWeights] = {}
        self._next_handle = 100
        self._thread: int | None = None
        self._closed = False
        self.calls = Calls()
        self.faults: list[Exception] = []  # raised by the next steps, one each
        self.before_step = lambda: None  # called at the begin of each prefill and decode

    @property
    def backend(self) -> str:
        return "reference"

    @property
    def digest(self) -> str:
        return digest_bytes(b"reference engine")

    @property
    def limits(self) -> EngineLimits:
        return self._limits

    @property
    def closed(self) -> bool:
        return self._closed

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        return weights

    def add_adapter(self, weights: AdapterWeights) -> int:
        self._enter()
        used = sum(w.rank for w in self._adapters.values())
        if used + weights.rank > self._limits.max_bank_rank:
            raise Exhausted(f"rank {used} + {weights.rank} > {self._limits.max_bank_rank}")
        self._next_handle += 1
        self._adapters[self._next_handle] = weights
        self.calls.adds.append(weights.digest)
        return self._next_handle

    def remove_adapter(self, handle: int) -> None:
        self._enter()
        if handle not in self._adapters:
            raise NotFound(f"no adapter has handle {handle}")
        self.calls.removes.append(self._adapters.pop(handle).digest)

    def prefill(
        self, row: int, tokens: np.ndarray, start: int, mix: Mix = (), length: int | None = None
    ) -> np.ndarray:
        self.calls.prefills.append((row, start, len(tokens)))
        self._chunk(row, tokens, start, mix, length)
        return self._logits(row)

    def score(
        self, row: int, tokens: np.ndarray, start: int, mix: Mix = (), length: int | None = None
    ) -> np.ndarray:
        assert len(tokens) <= self._limits.scored, f"{len(tokens)} tokens in one score"
        self.calls.scores.append((row, start, len(tokens)))
        states = self._chunk(row, tokens, start, mix, length)
        self._scored_from[row] = start + 1
        return (4 * states @ self._head.T).astype(np.float32)

    def embed(
        self, row: int, tokens: np.ndarray, start: int, mix: Mix = (), length: int | None = None
    ) -> np.ndarray:
        self.calls.embeds.append((row, start, len(tokens)))
        return self._chunk(row, tokens, start, mix, length).astype(np.float32)

    def decode(self, steps: Sequence[RowStep]) -> np.ndarray:
        self._begin_step()
        rows = [s.row for s in steps]
        assert rows and len(set(rows)) == len(rows), f"rows {rows}"
        self.calls.decodes.append(tuple(rows))
        for step in steps:
            least = min(self._held[step.row], self._scored_from[step.row])
            assert least <= step.position <= self._held[step.row], (step, self._held)
            self._scored_from[step.row] = self._limits.context
            long = self._is_long(step.position + 1 if step.length is None else step.length)
            self._read(step.row, step.token, step.position, step.mix, long)
        return np.stack([self._logits(row) for row in rows])

    def read_kv(self, row: int, start: int, stop: int) -> KvBlock:
        self._enter()
        assert self._limits.copies_kv, "this engine copies nothing"
        assert 0 <= start < stop <= self._held[row], f"row {row} holds {self._held[row]}"
        states, long = (a[row, start:stop].copy() for a in (self._states, self._long))
        return _Block(stop - start, (states,), long)

    def write_kv(self, row: int, start: int, block: KvBlock) -> None:
        self._enter()
        assert self._limits.copies_kv, "this engine copies nothing"
        assert 0 <= start <= self._held[row], f"row {row} holds {self._held[row]}, start {start}"
        self.calls.writes.append((row, start, block.tokens))
        self._states[row, start : start + block.tokens] = block.arrays[0]
        assert isinstance(block, _Block), "a block of another engine"
        self._long[row, start : start + block.tokens] = block.long
        self._held[row] = start + block.tokens

    def close(self) -> None:
        self._enter()
        self._closed = True

    def solo(
        self, prompt: Sequence[int], count: int, mix: Mapping[str, float] | None = None
    ) -> tuple[int, ...]:
        """Greedy tokens for a prompt with adapters (digest -> weight), alone in an engine."""
        answer: list[int] = []
        while len(answer) < count:
            state, long = np.zeros(HIDDEN), self._is_long(len(prompt) + len(answer))
            for token in (*prompt, *answer):
                state = self._next(state, token, mix or {}, long)
            answer.append(int((4 * self._head @ state).astype(np.float32).argmax()))
        return tuple(answer)

    def _is_long(self, length: int) -> bool:
        return self._limits.switch is not None and length > self._limits.switch

    def _chunk(
        self, row: int, tokens: np.ndarray, start: int, mix: Mix, length: int | None
    ) -> np.ndarray:
        """States [s, HIDDEN] of tokens at start.."""
        self._begin_step()
        assert tokens.dtype == np.int64 and tokens.ndim == 1 and len(tokens) > 0
        assert 0 <= start <= self._held[row], f"row {row} holds {self._held[row]}, start {start}"
        if start + len(tokens) > self._limits.context:
            raise PromptTooLong(f"{start} + {len(tokens)} tokens > {self._limits.context}")
        self._scored_from[row] = self._limits.context
        long = self._is_long(start + len(tokens) if length is None else length)
        for position, token in enumerate(tokens.tolist(), start):
            self._read(row, token, position, mix, long)
        return self._states[row, start : start + len(tokens)]

    def _read(self, row: int, token: int, position: int, mix: Mix, long: bool) -> None:
        missing = [e.handle for e in mix if e.handle not in self._adapters]
        if missing:
            raise NotFound(f"no adapter has handle {missing[0]}")
        weights = {self._adapters[e.handle].digest: e.weight for e in mix}
        before = self._states[row, position - 1] if position else np.zeros(HIDDEN)
        assert (self._long[row, :position] == long).all(), f"row {row} holds states of both kinds"
        self._states[row, position] = self._next(before, token, weights, long)
        self._long[row, position] = long
        self._held[row] = position + 1

    def _next(
        self, state: np.ndarray, token: int, mix: Mapping[str, float], long: bool = False
    ) -> np.ndarray:
        push = sum((w * _direction(d) for d, w in sorted(mix.items())), np.zeros(HIDDEN))
        return np.tanh(self._recur @ state + self._embed[token - long] + push)

    def _logits(self, row: int) -> np.ndarray:
        return (4 * self._head @ self._states[row, self._held[row] - 1]).astype(np.float32)

    def _begin_step(self) -> None:
        self._enter()
        self.before_step()
        if self.faults:
            raise self.faults.pop(0)

    def _enter(self) -> None:
        self._thread = self._thread or threading.get_ident()
        assert self._thread == threading.get_ident(), "two threads drive the engine"
        if self._closed:
            raise Unavailable("the engine is closed")


def fault(text: str = "the backend failed") -> EngineFault:
    return EngineFault(text)


def _direction(digest: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(digest.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(HIDDEN)
