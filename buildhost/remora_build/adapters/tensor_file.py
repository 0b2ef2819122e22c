"""Writes one safetensors file: the very bytes of `safetensors.numpy.save`, without its copies.

Owns the layout; knows nothing of adapters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES = {"float16": "F16", "float32": "F32"}
_WIDEST_FIRST = ("float32", "float16")
_ALIGNMENT = 8


def write_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """`tensors`: float16 or float32. Raises OSError."""
    header, end = {}, 0
    for name in sorted(tensors, key=lambda n: (_WIDEST_FIRST.index(tensors[n].dtype.name), n)):
        tensor = tensors[name]
        header[name] = {
            "dtype": _NAMES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in header:
            f.write(np.ascontiguousarray(tensors[name]).data)
