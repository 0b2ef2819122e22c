"""Experts' weights: one matrix [k, n] for each expert, stacked, so that a graph cuts one out before
anything is computed with it.

plain   NAME [E, k, n]
int4    NAME.q int32 [E, k / 8, n], NAME.scale [E, k / block, n]

Codes c lie eight in a word: of the k rows of a matrix, word row i holds rows i, i + k/8, ...,
i + 7 k/8, the first in the lowest four bits, each as c + 8. The type is int32 because an INT4 stack
would have to be dequantized as a whole before a matrix is cut out of it, and TensorRT keeps no
smaller type as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from remora_build.families.naming import Naming, Source
from remora_build.graph import layout
from remora_build.graph.data_file import DataFile
from remora_build.graph.layout import CODES_A_WORD, Slot
from remora_build.quantize import quantize
from remora_contract.targets import PARTS, Group

CODE_OFFSET = 8
CODES_A_HALF = CODES_A_WORD // 2
HALF = 16**CODES_A_HALF  # of a word

Rows = NDArray[np.generic]
Columns = Iterable[tuple[int, Rows]]  # (column in a packed matrix, rows [m, k] of a source)


def pack_words(codes: NDArray[np.int8]) -> NDArray[np.int32]:
    """[k, n] codes in -8..7 -> [k / 8, n]."""
    k, n = codes.shape
    words = np.zeros((k // CODES_A_WORD, n), np.uint32)
    for j, slice_j in enumerate(codes.reshape(CODES_A_WORD, k // CODES_A_WORD, n)):
        words |= (slice_j + np.int8(CODE_OFFSET)).astype(np.uint32) << np.uint32(4 * j)
    return words.view(np.int32)


class StackWriter:
    """`columns` yields packed sources, `rows` the blocks of one tensor [E, n, k]. Memory: one
    expert's matrix, and the scales of all."""

    def __init__(
        self,
        naming: Naming,
        slots: Mapping[str, Slot],
        out: DataFile,
        pool: Executor,
        columns: Callable[[Sequence[Source]], Columns],
        rows: Callable[[str], Iterable[tuple[int, Rows]]],
    ) -> None:
        self._naming = naming
        self._slots = slots
        self._out = out
        self._pool = pool
        self._columns = columns
        self._rows = rows

    def write(self, layer: int, group: Group, block: int | None) -> None:
        """Every expert's packed matrix, in int4 if a `block` is given."""
        name, experts = layout.group_weight(layer, group), self._experts(layer, group)
        if block is None:
            slot = self._slots[name]
            self._out.begin(slot)
            for columns in experts:
                self._out.append(_packed(slot, columns))
        else:
            self._codes(name, experts, block)

    def _codes(self, name: str, experts: Iterable[Columns], block: int) -> None:
        words, scales = self._slots[layout.codes(name)], self._slots[layout.scales(name)]
        k, n = words.shape[1] * CODES_A_WORD, words.shape[2]
        all_scales = np.empty(scales.shape, scales.dtype)
        self._out.begin(words)
        for own, columns in zip(all_scales, experts, strict=True):
            codes = np.empty((k, n), np.int8)
            for column, block_rows in columns:
                part = quantize(np.ascontiguousarray(block_rows.T), block, self._pool)
                end = column + len(block_rows)
                codes[:, column:end] = part.codes
                own[:, column:end] = part.scales
            self._out.append(pack_words(codes))
        self._out.put(scales, all_scales)

    def _experts(self, layer: int, group: Group) -> Iterator[Columns]:
        """The columns of each expert's packed matrix, expert by expert."""
        first = PARTS[group][0]
        if not self._naming.is_stacked(first):
            for expert in range(self._naming.spec.copies(first)):
                yield self._columns(self._naming.weights(layer, group, expert))
            return
        (source,) = self._naming.weights(layer, group, 0)
        for _, matrices in self._rows(source.tensor):
            for rows in matrices:
                yield [(0, rows)]


def _packed(slot: Slot, columns: Columns) -> Rows:
    """[k, n]"""
    packed = np.empty(slot.shape[1:], slot.dtype)
    for column, rows in columns:
        packed[:, column : column + len(rows)] = rows.astype(packed.dtype).T
    return packed
