"""What an engine takes of CUDA, so that all of it is given back. Knows no meaning of the bytes."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.trt.cuda import Cuda
from remora_contract.trt_memory import ALIGNMENT


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
    """Owns device and pinned memory, streams and events."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._taken = ExitStack()  # one that cannot be freed does not keep the others

    def device(self, size: int, what: str) -> int:
        """Raises Exhausted."""
        address = self._cuda.allocate(max(size, ALIGNMENT), what)
        self._taken.callback(self._cuda.free, address)
        return address

    def pinned(self, size: int, what: str) -> Pinned:
        """Raises Exhausted."""
        size = max(size, ALIGNMENT)
        address = self._cuda.allocate_pinned(size, what)
        self._taken.callback(self._cuda.free_pinned, address)
        return Pinned(address, size)

    def stream(self) -> int:
        stream = self._cuda.make_stream()
        self._taken.callback(self._cuda.destroy_stream, stream)
        return stream

    def event(self) -> int:
        event = self._cuda.make_event()
        self._taken.callback(self._cuda.destroy_event, event)
        return event

    def close(self) -> None:
        """In the reverse order of taking; what streams have queued must have run. Raises the last
        EngineFault."""
        self._taken.close()
