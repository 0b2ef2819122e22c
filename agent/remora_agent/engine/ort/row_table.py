"""The table that LowRankAdd reads: of each row, where its adapters' factors lie, and weights.

    table  int64 [rows, entries, places, 5]      entries: as many as the largest mix has adapters

Factors stay where the adapter was read; a swap changes numbers in this table and copies nothing
else. Rows without an adapter have rank 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.ort.low_rank import FIELDS, places
from remora_agent.engine.ort.session import Rows
from remora_agent.engine.ort.values import Buffer
from remora_agent.engine.protocol import Mix
from remora_contract.decoder import DecoderSpec

Entry = NDArray[np.int64]  # [places, FIELDS], of one adapter with weight 1
_RANK = 2
_WEIGHT = FIELDS - 1


def entry_of(decoder: DecoderSpec, weights: AdapterWeights) -> Entry:
    """Where the factors lie; valid as long as `weights` is kept. They must be contiguous."""
    where = places(decoder)
    entry = np.zeros((len(where), FIELDS), np.int64)
    for target, (a, b) in weights.tensors.items():
        if target not in where:  # the embedding and experts are no matter of the operator
            continue
        if not (a.flags.c_contiguous and b.flags.c_contiguous and a.dtype == b.dtype):
            raise ValueError(f"factors of {target.name()} are not ready for the operator")
        rank, bytes_ = a.shape[-1], a.itemsize
        entry[where[target]] = (a.ctypes.data, b.ctypes.data, rank, bytes_, _bits(1.0))
    return entry


def _bits(weight: float) -> int:
    with np.errstate(over="ignore"):  # by a large weight: the row's own answer suffers
        return int(np.float32(weight).view(np.uint32))


class RowTable:
    """Of all rows of an engine; `entry` gives an adapter's by its handle."""

    def __init__(self, decoder: DecoderSpec, rows: int, entry: Callable[[int], Entry]) -> None:
        self._entry = entry
        self._places = len(places(decoder))
        self._table: NDArray[np.int64] = np.zeros((rows, 1, self._places, FIELDS), np.int64)
        self._held: list[Mix] = [()] * rows
        self._views: dict[Rows, Buffer] = {}

    def fill(self, rows: Rows, mixes: Mapping[int, Mix]) -> Buffer:
        """The table of `rows`, of which those without a mix have none. Raises NotFound."""
        self._widen(max(map(len, mixes.values()), default=0))
        for row in range(rows.first, rows.first + rows.count):
            mix = mixes.get(row, ())
            if self._held[row] != mix:
                self._set(row, mix)
        if rows not in self._views:
            self._views[rows] = Buffer(self._table[rows.first : rows.first + rows.count])
        return self._views[rows]

    def forget(self, handle: int) -> None:
        """No row may point to what is gone."""
        for row, mix in enumerate(self._held):
            if any(e.handle == handle for e in mix):
                self._set(row, ())

    def _set(self, row: int, mix: Mix) -> None:
        found = [(self._entry(e.handle), e.weight) for e in mix]
        self._held[row] = mix
        self._table[row, :, :, _RANK] = 0
        for slot, (entry, weight) in zip(self._table[row], found, strict=False):
            slot[...] = entry
            slot[:, _WEIGHT] = _bits(weight)

    def _widen(self, entries: int) -> None:
        rows, had = self._table.shape[:2]
        if entries > had:
            wider = np.zeros((rows, entries, self._places, FIELDS), np.int64)
            wider[:, :had] = self._table
            self._table = wider
            self._views.clear()
