"""The checkpoint's bytes at any place, for several threads at once; plain reads, never mapped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import ITEM_BYTES, TensorEntry
from remora_build.checkpoint.stream import numpy_dtype
from remora_contract.errors import CheckpointInvalid


@dataclass(frozen=True)
class Grid:
    """A tensor as rows of its last dimension; a vector is one row."""

    rows: int
    columns: int

    @staticmethod
    def of(entry: TensorEntry) -> Grid:
        columns = entry.shape[-1] if entry.shape else 1
        return Grid(prod(entry.shape[:-1]), columns)


class CheckpointReader:
    """Keeps the files it read open. Raises CheckpointInvalid when one shrank or cannot be read."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._files.values():
            os.close(handle)

    def open(self, path: Path) -> None:
        """Before the first read, by one thread."""
        if path in self._files:
            return
        try:
            self._files[path] = os.open(path, os.O_RDONLY)
        except OSError as e:
            raise CheckpointInvalid(f"{path} cannot be read: {e.strerror or e}") from e

    def rows(self, entry: TensorEntry, first: int, count: int) -> NDArray[np.generic]:
        """[count, columns] in the tensor's own dtype."""
        columns = Grid.of(entry).columns
        row_bytes = columns * ITEM_BYTES[entry.dtype]
        raw = self.raw(entry, first * row_bytes, count * row_bytes)
        return raw.view(numpy_dtype(entry.dtype)).reshape(count, columns)

    def raw(self, entry: TensorEntry, start: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes from `start` within the tensor."""
        block = np.empty(size, np.uint8)
        view, done = block.data, 0
        while done < size:
            try:
                offset = entry.offset + start + done
                n = os.preadv(self._files[entry.path], [view[done:]], offset)
            except OSError as e:
                raise CheckpointInvalid(f"{entry.path} cannot be read: {e.strerror or e}") from e
            if not n:
                raise CheckpointInvalid(f"{entry.path} ended while {entry.name} was read")
            done += n
        return block
