"""One safetensors file written front to back: the header first, all sizes being known, then tensor
after tensor. Owns the format; at most one block is in memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import TensorEntry
from remora_contract.errors import CheckpointInvalid, InternalFault

_LENGTH_BYTES = 8


def read_metadata(path: Path) -> dict[str, str]:
    """`__metadata__` of a file whose header was checked already. Raises CheckpointInvalid."""
    try:
        with path.open("rb") as f:
            header = f.read(int.from_bytes(f.read(_LENGTH_BYTES), "little"))
    except OSError as e:
        raise CheckpointInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    metadata = json.loads(header).get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointInvalid(f"{path}: its __metadata__ is no table of texts")
    return metadata


class ShardFile:
    """`entries` in file order; only their names, dtypes and shapes count. Errors of writing are
    OSError."""

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        self._entries = entries
        self._missing = sum(e.bytes for e in entries)
        self._file = path.open("wb", buffering=0)

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise InternalFault(f"{self._file.name}: {self._missing} bytes of tensors are missing")

    def begin(self, metadata: Mapping[str, str]) -> None:
        """Writes the header."""
        self._write(memoryview(_header(self._entries, metadata)))

    def append(self, block: NDArray[np.generic]) -> None:
        """The block's row-major bytes."""
        self._missing -= block.nbytes
        self._write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)

    def _write(self, view: memoryview) -> None:
        while view:
            view = view[self._file.write(view) :]


def _header(entries: Sequence[TensorEntry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for e in entries:
        offsets = [end, end + e.bytes]
        header[e.name] = {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": offsets}
        end = offsets[1]
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % _LENGTH_BYTES)
    return len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded
