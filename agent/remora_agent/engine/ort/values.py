"""Numpy arrays as the runtime sees them: the same memory, bound once, changed in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


class Buffer:
    """An array and its OrtValue on the same memory. The array lives as long as this does."""

    def __init__(self, array: NDArray[Any]) -> None:
        if not array.flags.c_contiguous:
            raise ValueError("a bound array must be contiguous")
        self.array = array
        self.value = ort.OrtValue.ortvalue_from_numpy(array)


def zeros(shape: tuple[int, ...], dtype: type[np.generic]) -> Buffer:
    return Buffer(np.zeros(shape, dtype))
