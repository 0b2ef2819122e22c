"""adapter_model.safetensors or .bin: shapes first, then one tensor at a time, always as float32.

Owns nothing of the format (that is `remora_build.checkpoint`) nor what the tensors mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import TensorEntry, read_entries
from remora_build.checkpoint.stream import TensorStream, read_tensor
from remora_contract.errors import AdapterInvalid, CheckpointInvalid


class PeftWeights:
    """Raises AdapterInvalid when the file is damaged, Unsupported when a tensor is no plain float.

    The header is checked against the file's size before any tensor is read.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._entries = _entries(path)
            self._file = path.open("rb", buffering=0)
        except CheckpointInvalid as e:
            raise AdapterInvalid(str(e)) from e
        except OSError as e:
            raise AdapterInvalid(f"{path} cannot be read: {e.strerror or e}") from e

    def __enter__(self) -> PeftWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def float32(self, name: str) -> NDArray[np.float32]:
        try:
            tensor = read_tensor(self._file, self._entries[name])
        except CheckpointInvalid as e:
            raise AdapterInvalid(str(e)) from e
        return tensor.astype(np.float32, copy=False)

    def rows(self, name: str) -> Iterator[NDArray[Any]]:
        """Some rows after each other, in the type they are stored in: for large tables."""
        try:
            with TensorStream() as stream:
                for _, rows in stream.rows(self._entries[name]):
                    yield rows
        except CheckpointInvalid as e:
            raise AdapterInvalid(str(e)) from e


def _entries(path: Path) -> dict[str, TensorEntry]:
    if path.suffix != ".bin":
        return read_entries(path)
    from remora_build.checkpoint.torch_file import read_torch_entries  # few are still pickled

    return read_torch_entries(path)
