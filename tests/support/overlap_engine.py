"""The reference engine that reads a prompt beside decode steps, and checks that nobody touches the
row meanwhile. The prompt is computed when it is ended: what was decoded meanwhile must not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from remora_agent.engine.protocol import KvBlock, Mix, RowStep
from tests.support.reference_engine import ReferenceEngine


class OverlapEngine(ReferenceEngine):
    def __init__(self, *args: int, asks: int = 3, **more: Any) -> None:
        """`asks`: how often it is asked until a prompt is ready."""
        super().__init__(*args, **more)
        self._limits = replace(self._limits, overlaps=True)
        self._asks, self._asked = asks, 0
        self._begun: tuple[int, np.ndarray, int, Mix, int | None] | None = None
        self.refuse_begin: list[Exception] = []
        self.beside: list[tuple[int, ...]] = []  # rows of steps beside a prompt

    def begin_prefill(
        self,
        row: int,
        tokens: np.ndarray,
        start: int,
        mix: Mix = (),
        length: int | None = None,
    ) -> None:
        assert self._begun is None, "a second prompt was begun"
        if self.refuse_begin:
            raise self.refuse_begin.pop()
        self._begun, self._asked = (row, tokens, start, mix, length), 0

    def prefill_ready(self) -> bool:
        assert self._begun is not None
        self._asked += 1
        return self._asked >= self._asks

    def end_prefill(self) -> np.ndarray:
        assert self._begun is not None
        begun, self._begun = self._begun, None
        return super().prefill(*begun)

    def prefill(self, row: int, *more: Any, **named: Any) -> np.ndarray:
        self._check(row)
        return super().prefill(row, *more, **named)

    def decode(self, steps: Sequence[RowStep]) -> np.ndarray:
        self._check(*(s.row for s in steps))
        if self._begun is not None:
            self.beside.append(tuple(s.row for s in steps))
        return super().decode(steps)

    def score(self, row: int, *more: Any, **named: Any) -> np.ndarray:
        self._check(row)
        return super().score(row, *more, **named)

    def embed(self, row: int, *more: Any, **named: Any) -> np.ndarray:
        self._check(row)
        return super().embed(row, *more, **named)

    def read_kv(self, row: int, start: int, stop: int) -> KvBlock:
        self._check(row)
        return super().read_kv(row, start, stop)

    def write_kv(self, row: int, start: int, block: KvBlock) -> None:
        self._check(row)
        super().write_kv(row, start, block)

    def _check(self, *rows: int) -> None:
        assert self._begun is None or self._begun[0] not in rows, "the row is being read"
