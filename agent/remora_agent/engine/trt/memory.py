"""What an engine allocates, so that all of it is freed. Knows sizes; no meaning of the bytes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.trt.cuda import ALIGNMENT, Cuda


def aligned(size: int) -> int:
    """`size` rounded up to where another tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Pinned:
    """Host memory that the device reads and writes."""

    def __init__(self, address: int, size: int) -> None:
        self.address = address
        self.size = size
        self._raw = memoryview((ctypes.c_uint8 * size).from_address(address))

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], at: int = 0) -> NDArray[Any]:
        """A view; invalid once the memory is freed."""
        count = int(np.prod(shape, dtype=np.int64))
        raw = np.frombuffer(self._raw, np.uint8, count * dtype.itemsize, at)
        found: NDArray[Any] = raw.view(dtype).reshape(shape)
        return found


class Memory:
    """Owns device and pinned memory."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._device: list[int] = []
        self._pinned: list[int] = []

    def device(self, size: int, what: str) -> int:
        """Raises Exhausted."""
        address = self._cuda.allocate(max(size, ALIGNMENT), what)
        self._device.append(address)
        return address

    def pinned(self, size: int, what: str) -> Pinned:
        """Raises Exhausted."""
        size = max(size, ALIGNMENT)
        address = self._cuda.allocate_pinned(size, what)
        self._pinned.append(address)
        return Pinned(address, size)

    def close(self) -> None:
        while self._device:
            self._cuda.free(self._device.pop())
        while self._pinned:
            self._cuda.free_pinned(self._pinned.pop())
