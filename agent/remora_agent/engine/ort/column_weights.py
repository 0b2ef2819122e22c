"""Weights of MatMulNBits, in blocks of 4 or 8 bits -> 8 bits with one scale a column. Pure.

    MatMulNBits   codes [n, blocks, block * bits / 8], scales [n, blocks], zeros or none
    column form   codes [k, n], scale [n]:   w = (code - zero) * scale,  |code - zero| <= 127

A code's step is the column's largest number / 127, so a weight moves by half of that at most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LARGEST = 127
_MIDDLE_OF_BYTE = 128
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class BlockWeight:
    """One weight as MatMulNBits has it; `zeros` None: codes stand around the middle."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    bits: int
    block: int
    k: int

    def values(self, begin: int, end: int) -> NDArray[np.float32]:
        """[end - begin, k]: the numbers of outputs begin..end-1."""
        rows, blocks = end - begin, self.scales.reshape(len(self.codes), -1).shape[1]
        codes = _widened(self.codes[begin:end].reshape(rows, -1), self.bits)
        centred = codes.reshape(rows, blocks, self.block) - self._zero(begin, end, blocks)
        scales = self.scales.reshape(-1, blocks)[begin:end, :, None]
        values: NDArray[np.float32] = centred.astype(np.float32) * scales
        return values.reshape(rows, -1)[:, : self.k]

    def _zero(self, begin: int, end: int, blocks: int) -> NDArray[np.int16] | int:
        if self.zeros is None:
            return 1 << (self.bits - 1)
        packed = self.zeros.reshape(len(self.codes), -1)[begin:end]
        zeros: NDArray[np.int16] = _widened(packed, self.bits)[:, :blocks, None]
        return zeros


def _widened(packed: NDArray[np.uint8], bits: int) -> NDArray[np.int16]:
    """Bytes [rows, m] -> codes [rows, m * 8 / bits], the low nibble first."""
    if bits == 8:
        return packed.astype(np.int16)
    pairs = np.stack([packed & 0xF, packed >> 4], axis=-1)
    return pairs.reshape(len(packed), -1).astype(np.int16)


def by_column(
    weight: BlockWeight, signed: bool
) -> tuple[NDArray[np.int8] | NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [k, n] and scale [n]; unsigned codes stand around 128. Some outputs at a time."""
    n = len(weight.codes)
    codes = np.empty((weight.k, n), np.int8 if signed else np.uint8)
    scale = np.empty(n, np.float32)
    for begin in range(0, n, _ROWS_AT_ONCE):
        end = min(begin + _ROWS_AT_ONCE, n)
        values = weight.values(begin, end)
        largest = np.abs(values).max(axis=1)
        scale[begin:end] = np.where(largest > 0, largest / _LARGEST, 1.0)
        rounded = np.rint(values / scale[begin:end, None])
        codes[:, begin:end] = (rounded if signed else rounded + _MIDDLE_OF_BYTE).T
    return codes, scale
