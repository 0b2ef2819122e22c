"""The bank's arrays on the device, of which T columns are bound: how bytes get in, and move with T.

    A [k, T]   B [T, n]   experts' A [E, k, T]   B [E, T, n]    all are [outer, T, inner]

Memory is for the largest T. Only with one outer row do the bytes of a column not depend on T;
elsewhere another T means another layout. All is queued on the copy stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.trt.columns import runs
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.memory import Pinned
from remora_contract.trt_memory import aligned


@dataclass(frozen=True)
class Place:
    """One array [outer, T, inner]."""

    address: int
    outer: int
    inner: int


class Writer:
    """Queues what happens to the arrays."""

    def __init__(
        self,
        cuda: Cuda,
        stream: int,
        staging: Pinned,
        scratch: int,
        ones: int,
        dtype: np.dtype[Any],
    ) -> None:
        """`staging`: what bytes from the host go through, at least one outer row of a block;
        `scratch`: on the device, as large as the largest array that is laid out anew; `ones`:
        there too, for as many as `make_ones` is told."""
        self._cuda = cuda
        self._stream = stream
        self._staging = staging
        self._scratch = scratch
        self._ones = ones
        self.dtype = dtype
        self._staged = 0  # bytes of the staging memory that may still be on their way

    def clear_all(self, place: Place, most: int) -> None:
        """Zeros, for every T."""
        size = place.outer * most * place.inner * self.dtype.itemsize
        self._cuda.clear(place.address, size, self._stream)

    def clear(self, place: Place, bound: int, columns: tuple[int, ...]) -> None:
        """Zeros in some of T = `bound` columns."""
        width = place.inner * self.dtype.itemsize
        for _, first, count in runs(columns):
            at = place.address + first * width
            if place.outer == 1:
                self._cuda.clear(at, count * width, self._stream)
            else:
                self._cuda.clear_2d(at, bound * width, count * width, place.outer, self._stream)

    def widen(self, place: Place, old: int, new: int) -> None:
        """Lays T = `old` columns out as `new`; those that come with it are zeros. With one outer
        row they were that before."""
        if place.outer == 1:
            return
        width = place.inner * self.dtype.itemsize
        before, after = old * width, new * width
        if old:
            size = place.outer * before
            self._cuda.copy(self._scratch, place.address, size, "on_device", self._stream)
        self._cuda.clear(place.address, place.outer * after, self._stream)
        if old:
            ends = (place.address, after), (self._scratch, before)
            self._cuda.copy_2d(*ends, before, place.outer, "on_device", self._stream)

    def put(
        self,
        place: Place,
        bound: int,
        columns: tuple[int, ...],
        block: NDArray[Any],
        skipped: int = 0,
    ) -> None:
        """Writes block [outer, len(columns), w] to those of T = `bound` columns, behind `skipped`
        of their inner numbers."""
        width = place.inner * self.dtype.itemsize
        at = place.address + skipped * self.dtype.itemsize
        for i, first, count in runs(columns):
            run = block[:, i : i + count]
            if place.inner == 1:
                self.put_rows(run[:, :, 0], at + first * width, bound * width)
            elif place.outer == 1:
                self.put_rows(run[0], at + first * width, width)
            else:
                for j in range(count):
                    self.put_rows(run[:, j], at + (first + j) * width, bound * width)

    def zero(self, address: int, count: int) -> None:
        """Zeros in numbers that lie side by side."""
        self._cuda.clear(address, count * self.dtype.itemsize, self._stream)

    def make_ones(self, count: int) -> None:
        """Before the first `one`."""
        self.put_rows(np.ones((1, count), self.dtype), self._ones, count * self.dtype.itemsize)

    def one(self, address: int, count: int) -> None:
        """Ones in numbers that lie side by side, copied on the device."""
        size = count * self.dtype.itemsize
        self._cuda.copy(address, self._ones, size, "on_device", self._stream)

    def put_rows(self, array: NDArray[Any], address: int, pitch: int) -> None:
        """Copies array [h, w] to rows `pitch` bytes apart, through the staging memory."""
        width = array.shape[1] * self.dtype.itemsize
        at_once = self._staging.size // width
        for begin in range(0, len(array), at_once):
            part = array[begin : begin + at_once]
            src = (self._stage(part), width)
            dst = (address + begin * pitch, pitch)
            self._cuda.copy_2d(dst, src, width, len(part), "to_device", self._stream)

    def _stage(self, part: NDArray[Any]) -> int:
        """Where it lies in pinned memory. Waits only when there is no room behind what was put
        there before."""
        size = aligned(part.size * self.dtype.itemsize)
        if self._staged + size > self._staging.size:
            self._cuda.synchronize(self._stream)
            self._staged = 0
        at, self._staged = self._staged, self._staged + size
        self._staging.array(part.shape, self.dtype, at)[...] = part
        return self._staging.address + at
