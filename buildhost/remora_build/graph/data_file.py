"""model.onnx.data, written front to back and hashed on the way by a second thread.

Owns offsets, padding and the digest; knows nothing of weights. At most one block is in flight.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from remora_build.graph.layout import Slot
from remora_contract.bundle import BundleFile
from remora_contract.errors import InternalFault


class DataFile:
    """Slots are put in file order, each in one or more blocks. Errors of writing are OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb", buffering=0)
        self._hasher = hashlib.sha256()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: Future[None] | None = None
        self._end = 0

    def __enter__(self) -> DataFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.shutdown()
        self._file.close()

    def begin(self, slot: Slot) -> None:
        """Pads up to the slot's offset. Raises InternalFault when slots come out of order."""
        if slot.offset < self._end:
            raise InternalFault(f"{slot.name} is written out of order")
        if slot.offset > self._end:
            self.append(np.zeros(slot.offset - self._end, np.uint8))

    def append(self, block: NDArray[np.generic]) -> None:
        """The block's row-major bytes; it must not change until the next call returns."""
        raw = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
        self._settle()
        self._writing = self._worker.submit(self._write, raw)
        self._end += raw.size

    def put(self, slot: Slot, array: NDArray[np.generic]) -> None:
        """A whole initializer. Raises InternalFault when its size is not the slot's."""
        if array.nbytes != slot.bytes:
            raise InternalFault(f"{slot.name}: {array.nbytes} bytes for a slot of {slot.bytes}")
        self.begin(slot)
        self.append(array)

    def finish(self, name: str) -> BundleFile:
        """What bundle.json says about the file, called `name` there."""
        self._settle()
        return BundleFile(name, self._end, "sha256:" + self._hasher.hexdigest())

    def _settle(self) -> None:
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, raw: NDArray[np.uint8]) -> None:
        view = raw.data
        while view:
            view = view[self._file.write(view) :]
        self._hasher.update(raw.data)
