"""Reads parts of initializers back from the data file with plain reads; nothing is mapped, so only
what is asked for is ever in memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from remora_build.graph.forms import NUMPY
from remora_build.graph.layout import Slot
from remora_build.quantize import unpack_nibbles
from remora_contract.errors import InternalFault


class SlotReader:
    """Rows and columns of the matrices in an open data file."""

    def __init__(self, file: int, slots: Mapping[str, Slot]) -> None:
        self._file = file
        self._slots = slots

    def rows(self, name: str, begin: int, end: int) -> NDArray[np.generic]:
        """[end - begin, columns]"""
        slot = self._slots[name]
        block = np.empty((end - begin, slot.shape[1]), NUMPY[slot.dtype])
        row_bytes = block.itemsize * slot.shape[1]
        self._read(block, slot.offset + begin * row_bytes)
        return block

    def columns(self, name: str, begin: int, end: int) -> NDArray[np.generic]:
        """[rows, end - begin] of a matrix; a vector is one row."""
        slot = self._slots[name]
        rows, n = slot.shape if len(slot.shape) == 2 else (1, *slot.shape)
        block = np.empty((rows, end - begin), NUMPY[slot.dtype])
        for row in range(rows):
            self._read(block[row], slot.offset + (row * n + begin) * block.itemsize)
        return block

    def code_columns(self, name: str, begin: int, end: int) -> NDArray[np.int8]:
        """[rows, end - begin] of a matrix of 4-bit codes, signed. With an odd number of columns
        every other row starts in the middle of a byte."""
        slot = self._slots[name]
        rows, n = slot.shape
        raw = np.zeros((rows, (end - begin) // 2 + 1), np.uint8)
        starts = np.arange(rows) * n + begin
        for row, start in enumerate(starts.tolist()):
            stop = min((start + end - begin + 1) // 2, slot.bytes)
            self._read(raw[row, : stop - start // 2], slot.offset + start // 2)
        codes = unpack_nibbles(raw)
        shifted = np.where((starts % 2 == 1)[:, None], codes[:, 1:], codes[:, :-1])
        return np.ascontiguousarray(shifted[:, : end - begin])

    def whole(self, name: str) -> NDArray[np.generic]:
        """A small initializer, in its shape."""
        slot = self._slots[name]
        block = np.empty(slot.shape, NUMPY[slot.dtype])
        self._read(block, slot.offset)
        return block

    def _read(self, block: NDArray[np.generic], offset: int) -> None:
        view = block.reshape(-1).view(np.uint8).data
        if os.preadv(self._file, [view], offset) != len(view):
            raise InternalFault("model.onnx.data is shorter than the graph says")
