"""Writes one safetensors file: the very bytes of `safetensors.numpy.save`, in one pass, holding one
tensor at a time.

Owns the layout; knows nothing of adapters.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Dtype = Literal["float16", "float32"]
_NAMES: dict[Dtype, str] = {"float16": "F16", "float32": "F32"}
_WIDEST_FIRST: tuple[Dtype, ...] = ("float32", "float16")
_ALIGNMENT = 8


class Tensor(NamedTuple):
    """`values` makes the array when it is written: of that dtype and shape."""

    dtype: Dtype
    shape: tuple[int, ...]
    values: Callable[[], NDArray[Any]]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Returns the file's digest. Raises OSError, and what the `values` raise."""
    names = sorted(tensors, key=lambda n: (_WIDEST_FIRST.index(tensors[n].dtype), n))
    start = _header({name: tensors[name] for name in names})
    hasher = hashlib.sha256(start)
    with path.open("wb") as f:
        f.write(start)
        for name in names:
            rows = np.asarray(tensors[name].values(), tensors[name].dtype, order="C")
            if rows.shape != tensors[name].shape:
                raise ValueError(f"{name} is {rows.shape}, said to be {tensors[name].shape}")
            block = rows.reshape(-1).view(np.uint8).data
            hasher.update(block)
            f.write(block)
    return "sha256:" + hasher.hexdigest()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    header, end = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.bytes],
        }
        end += tensor.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
