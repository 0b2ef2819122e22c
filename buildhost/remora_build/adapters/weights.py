"""adapter_model.safetensors: shapes first, then one tensor at a time, always as float32.

Owns which element types an adapter may have; knows nothing of what the tensors mean.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from remora_contract.errors import AdapterInvalid, Unsupported

_MAX_HEADER_BYTES = 100_000_000
_ITEM_TYPE = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class PeftWeights:
    """A context manager over the file. Raises AdapterInvalid when it is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")
        size = path.stat().st_size
        (length,) = struct.unpack("<Q", self._file.read(8).ljust(8, b"\xff"))
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise AdapterInvalid(
                f"{path}: header of {length} bytes in a file of {size}: truncated?"
            )
        self._header = json.loads(self._file.read(length))
        self._header.pop("__metadata__", None)
        self._start = 8 + length

    def __enter__(self) -> PeftWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry["shape"]) for name, entry in self._header.items()}

    def float32(self, name: str) -> NDArray[np.float32]:
        """Raises Unsupported for an element type an adapter does not have."""
        entry = self._header[name]
        if entry["dtype"] not in _ITEM_TYPE:
            raise Unsupported(f"tensor {name} is {entry['dtype']}; adapters are F32, F16 or BF16")
        begin, end = entry["data_offsets"]
        self._file.seek(self._start + begin)
        raw = np.frombuffer(self._file.read(end - begin), _ITEM_TYPE[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            raw = (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return raw.astype(np.float32).reshape(entry["shape"])
