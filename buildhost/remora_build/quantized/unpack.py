"""How tools pack codes into bytes and words, undone. Pure numpy; every answer is a fresh array."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_NIBBLES = np.arange(0, 32, 4, dtype=np.uint32)
# AutoAWQ puts column 8 i + _AWQ_ORDER[j] of a row into nibble j of word i.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def byte_nibbles(packed: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    """Two nibbles a byte along `axis`, which doubles; the low one first."""
    pairs = np.stack([packed & 0xF, packed >> 4], axis=axis + 1)
    shape = list(packed.shape)
    shape[axis] *= 2
    return pairs.reshape(shape)


def word_nibbles(packed: NDArray[np.int32], axis: int) -> NDArray[np.uint8]:
    """Eight nibbles a 32-bit word along `axis`, the lowest first."""
    words = np.expand_dims(packed.view(np.uint32), axis + 1)
    shifts = np.expand_dims(_NIBBLES, tuple(range(1, packed.ndim - axis)))
    shape = list(packed.shape)
    shape[axis] *= 8
    return ((words >> shifts) & 0xF).astype(np.uint8).reshape(shape)


def word_bytes(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Four bytes a 32-bit word along the last axis, the lowest first."""
    return np.array(np.ascontiguousarray(packed, "<i4").view(np.uint8))


def awq_nibbles(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Eight nibbles a word along the last axis in AutoAWQ's order."""
    nibbles = word_nibbles(packed, packed.ndim - 1)
    eights = nibbles.reshape(*packed.shape, 8)
    ordered = np.empty_like(eights)
    ordered[..., list(_AWQ_ORDER)] = eights
    return ordered.reshape(nibbles.shape)


def signed_nibbles(nibbles: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Two's complement: 0..7 stay, 8..15 become -8..-1."""
    return ((nibbles << 4).view(np.int8)) >> 4


def centred(nibbles: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Stored with 8 added: 0..15 become -8..7."""
    return np.asarray(nibbles.view(np.int8) - np.int8(8))


def powers_of_two(bits: NDArray[np.uint8]) -> NDArray[np.float32]:
    """e8m0: 2^(bits - 127); 255 is NaN. What is below float32's normal range is rounded up to it,
    which only blocks of zeros use."""
    values = np.exp2(np.maximum(bits.astype(np.float32), 1) - 127)
    return np.asarray(np.where(bits == 255, np.nan, values), np.float32)


def turned(array: NDArray[Any]) -> NDArray[Any]:
    """[n, k] -> contiguous [k, n]."""
    return np.ascontiguousarray(array.T)
