"""A tensor's bytes in chunks of rows: read once with plain reads, hashed on the way, never mapped.

Owns buffers and digests; knows neither model nor precision. Memory: one chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import FileIO
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import SourceDtype, TensorEntry
from remora_contract.errors import CheckpointInvalid

if TYPE_CHECKING:
    from concurrent.futures import Future

CHUNK_BYTES = 2 << 20  # fits the processor's cache on its way through
_NUMPY: dict[SourceDtype, np.dtype[np.generic]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype(np.uint8),  # bits: what they stand for is the reader's business
    "F8_E8M0": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}


def numpy_dtype(dtype: SourceDtype) -> np.dtype[np.generic]:
    """What a tensor's bytes are viewed as."""
    if dtype != "BF16":
        return _NUMPY[dtype]
    import ml_dtypes  # most adapters have none

    bfloat16: np.dtype[np.generic] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


class TensorStream:
    """Reads tensors one after the other and remembers the sha256 of each one read to its end."""

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        from concurrent.futures import ThreadPoolExecutor

        self._chunk_bytes = chunk_bytes
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self.digests: dict[str, str] = {}

    def __enter__(self) -> TensorStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._worker.shutdown()

    def rows(self, entry: TensorEntry) -> Iterator[tuple[int, NDArray[np.generic]]]:
        """(first row, rows [m, ...] in the source dtype) in order; a vector is one row [n].

        A yielded array is valid until the next one. Raises CheckpointInvalid when the file shrank.
        """
        hasher, hashing = hashlib.sha256(), None
        row_count, row_shape = _as_rows(entry.shape)
        row_bytes = entry.bytes // row_count if row_count else 0
        step = max(1, self._chunk_bytes // max(1, row_bytes))
        try:
            with entry.path.open("rb", buffering=0) as f:
                f.seek(entry.offset)
                for first in range(0, row_count, step):
                    _finish(hashing)
                    count = min(step, row_count - first)
                    block = _read_exactly(f, count * row_bytes, entry)
                    hashing = self._worker.submit(hasher.update, block.data)
                    yield first, block.view(numpy_dtype(entry.dtype)).reshape(count, *row_shape)
        except OSError as e:
            raise CheckpointInvalid(f"{entry.path} cannot be read: {e.strerror or e}") from e
        _finish(hashing)
        self.digests[entry.name] = "sha256:" + hasher.hexdigest()

    def digest(self, entry: TensorEntry) -> None:
        """Reads a tensor for nothing but its digest."""
        for _ in self.rows(entry):
            pass

    def whole(self, entry: TensorEntry) -> NDArray[np.generic]:
        """A small tensor (norm, bias) at once, in the source dtype and shape."""
        parts = [block.copy() for _, block in self.rows(entry)]
        return np.concatenate(parts).reshape(entry.shape)


def read_tensor(file: FileIO, entry: TensorEntry) -> NDArray[np.generic]:
    """All of a tensor at once from its own open file, not hashed, in the source dtype and shape.
    Raises CheckpointInvalid."""
    try:
        file.seek(entry.offset)
        block = _read_exactly(file, entry.bytes, entry)
    except OSError as e:
        raise CheckpointInvalid(f"{entry.path} cannot be read: {e.strerror or e}") from e
    return block.view(numpy_dtype(entry.dtype)).reshape(entry.shape)


def _as_rows(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    return (shape[0], shape[1:]) if len(shape) > 1 else (1, shape)


def _finish(hashing: Future[None] | None) -> None:
    if hashing is not None:
        hashing.result()


def _read_exactly(file: FileIO, size: int, entry: TensorEntry) -> NDArray[np.uint8]:
    block = np.empty(size, np.uint8)
    view, done = block.data, 0
    while done < size:
        n = file.readinto(view[done:])
        if not n:
            raise CheckpointInvalid(f"{entry.path} ended while {entry.name} was read")
        done += n
    return block
