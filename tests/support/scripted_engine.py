"""A reference engine that answers every prompt with the same written text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from remora_agent.engine.protocol import Engine, Mix
from remora_contract.bundle import load_bundle
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import EOS, VOCAB, byte_tokenizer
from tests.support.serving import MAX_RANK, ReferenceEngines


class ScriptedEngine(ReferenceEngine):
    """`answer`, token for token, then end of sequence."""

    def __init__(self, rows: int, context: int, vocab: int, max_bank_rank: int) -> None:
        super().__init__(rows, context, vocab, max_bank_rank)
        self.answer: list[int] = []
        self._ends = [0] * rows  # where each row's prompt ends

    def prefill(
        self, row: int, tokens: np.ndarray, start: int, mix: Mix = (), length: int | None = None
    ) -> np.ndarray:
        self._ends[row] = start + len(tokens)
        return super().prefill(row, tokens, start, mix, length)

    def score(
        self, row: int, tokens: np.ndarray, start: int, mix: Mix = (), length: int | None = None
    ) -> np.ndarray:
        super().score(row, tokens, start, mix, length)
        return np.stack([self._after(row, start + i + 1) for i in range(len(tokens))])

    def _logits(self, row: int) -> np.ndarray:
        return self._after(row, self._held[row])

    def _after(self, row: int, held: int) -> np.ndarray:
        place = held - self._ends[row]
        token = self.answer[place] if place < len(self.answer) else EOS
        logits = np.zeros(self._limits.vocab, np.float32)
        logits[token] = 30.0
        return logits


class ScriptedEngines(ReferenceEngines):
    """`says` is what every engine answers from now on; `special` the tokenizer's last token."""

    def __init__(self, rows: int = 4, special: str = "<pad>") -> None:
        super().__init__(rows)
        self._tokenizer = byte_tokenizer(special)

    def load(self, bundle_dir: Path) -> Engine:
        bundle = load_bundle(bundle_dir)
        engine = ScriptedEngine(self.rows, bundle.graph.context, VOCAB, MAX_RANK)
        engine.before_step = lambda: self.gate.wait(30) or None
        self.opened.append(engine)
        return engine

    def says(self, text: str) -> None:
        for engine in self.opened:
            assert isinstance(engine, ScriptedEngine)
            engine.answer = self._tokenizer.encode(text).ids
