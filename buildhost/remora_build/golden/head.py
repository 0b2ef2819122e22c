"""The winners over the vocabulary, in chunks read from the data file: the head is the largest
matrix of a small model and is never held whole.

    logits [rows, vocab] = x [rows, hidden] @ W        W = embedding^T, head, or dequantized head
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from remora_build.golden.slots import SlotReader
from remora_build.golden.stored_head import head_columns, prepared
from remora_build.graph import layout
from remora_build.graph.layout import Slot
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec

CHUNK = 8192  # vocabulary entries


@dataclass(frozen=True)
class Winners:
    """Per row: the arg-max, and its and the runner-up's product with the head."""

    token: NDArray[np.int64]
    first: NDArray[np.float32]
    second: NDArray[np.float32]
    spec: DecoderSpec

    @property
    def logit(self) -> NDArray[np.float32]:
        return self._finished(self.first)

    @property
    def margin(self) -> NDArray[np.float32]:
        """The arg-max's lead."""
        return self._finished(self.first) - self._finished(self.second)

    def _finished(self, product: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits of products; the greatest stays the greatest."""
        cap = self.spec.logit_softcap
        scaled = np.asarray(product * np.float32(self.spec.logit_scale))
        return scaled if cap is None else np.asarray(np.tanh(scaled / cap) * np.float32(cap))


def winners(
    x: NDArray[np.float32],
    data: Path,
    slots: Mapping[str, Slot],
    spec: DecoderSpec,
    graph: GraphSpec,
) -> Winners:
    """`x` [rows, hidden]: normalised hidden states. Ties go to the lower token."""
    rows = np.arange(len(x))
    token = np.zeros(len(x), np.int64)
    first = np.full(len(x), -np.inf, np.float32)
    second = first.copy()
    x = prepared(x, data, slots, graph)
    for begin, weight in _chunks(data, slots, spec, graph):
        logits = x @ weight
        best = logits.argmax(axis=1)
        top = logits[rows, best]
        logits[rows, best] = -np.inf
        runner_up = logits.max(axis=1)
        second = np.maximum.reduce([second, runner_up, np.minimum(first, top)])
        token = np.where(top > first, begin + best, token)
        first = np.maximum(first, top)
    return Winners(token, first, second, spec)


def _chunks(
    data: Path, slots: Mapping[str, Slot], spec: DecoderSpec, graph: GraphSpec
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first vocabulary entry, W[:, chunk] float32 [hidden, chunk])."""
    with data.open("rb") as file:
        reader = SlotReader(file.fileno(), slots)
        for begin in range(0, spec.vocab, CHUNK):
            end = min(begin + CHUNK, spec.vocab)
            if not layout.has_head(spec, graph):
                yield begin, reader.rows(layout.EMBED, begin, end).astype(np.float32).T
            elif layout.HEAD in slots:
                yield begin, reader.columns(layout.HEAD, begin, end).astype(np.float32)
            else:
                yield begin, head_columns(reader, slots, graph, begin, end)
