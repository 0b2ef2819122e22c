"""numpy's .npy files, distrusted: header and size are checked before memory is taken. No pickles.

    93 4e 55 4d 50 59 | version u8 u8 | header length u16 (u32 from version 2) | header | data

Owns the format of C-ordered, little-endian arrays of four types; knows nothing of adapters. numpy
has no bfloat16, so TensorRT-LLM stores it as two-byte void: descr '|V2'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from remora_build.adapters.formats.cast import numpy_dtype
from remora_build.adapters.formats.registry import StoredDtype
from remora_contract.errors import AdapterInvalid

NpyDtype = Literal["float16", "bfloat16", "float32", "int32"]
DESCR: dict[NpyDtype, str] = {
    "float16": "<f2",
    "bfloat16": "|V2",
    "float32": "<f4",
    "int32": "<i4",
}
_ITEM_BYTES: dict[NpyDtype, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4}
_OF_DESCR: dict[str, NpyDtype] = {descr[1:]: dtype for dtype, descr in DESCR.items()}
_LENGTH_BYTES = {1: 2, 2: 4, 3: 4}
_MAX_HEADER_BYTES = 4096
_MAX_DIMENSIONS = 8
_HEADER = re.compile(
    r"\{ *'descr': *'([<|=>]?)([A-Za-z]\d{1,3})', *'fortran_order': *(True|False), *"
    r"'shape': *\(([0-9, ]*)\),? *\}\s*"
)


@dataclass(frozen=True)
class NpyFile:
    """A file whose header and size agree. Data begins at `offset`, bytes from the start."""

    path: Path
    dtype: NpyDtype
    shape: tuple[int, ...]
    offset: int

    def items(self, file: BinaryIO, first: int, count: int) -> NDArray[Any]:
        """[count] items in row-major order from item `first`, in the stored type. Raises
        AdapterInvalid when the file shrank meanwhile."""
        size = _ITEM_BYTES[self.dtype]
        file.seek(self.offset + first * size)
        data = file.read(count * size)
        if len(data) != count * size:
            raise AdapterInvalid(f"{self.path} ended while it was read")
        kind = np.dtype("<i4") if self.dtype == "int32" else numpy_dtype(self.dtype)
        return np.frombuffer(data, kind)


def open_npy(path: Path) -> NpyFile:
    """Reads the header. Raises AdapterInvalid naming the file: absent, no .npy file, a type or
    order that is not read, or more or fewer bytes than its shape says."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise AdapterInvalid(f"{path} is no file")
        size = path.stat().st_size
        with path.open("rb") as f:
            header, offset = _read_header(path, f.read)
    except FileNotFoundError as e:
        raise AdapterInvalid(f"{path} does not exist") from e
    except OSError as e:
        raise AdapterInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    dtype, shape = _parse(path, header)
    expected = offset + prod(shape) * _ITEM_BYTES[dtype]
    if size != expected:
        raise AdapterInvalid(
            f"{path} has {size} bytes, its header promises {expected}: "
            + ("truncated?" if size < expected else "damaged?")
        )
    return NpyFile(path, dtype, shape, offset)


def write_npy(
    path: Path, dtype: NpyDtype, shape: tuple[int, ...], rows: Iterable[NDArray[Any]]
) -> None:
    """Writes `rows`, which together hold the array in row-major order, one at a time. Raises
    OSError."""
    written = 0
    with path.open("wb") as f:
        npy_format.write_array_header_1_0(
            f, {"descr": DESCR[dtype], "fortran_order": False, "shape": shape}
        )
        for row in rows:
            written += f.write(np.ascontiguousarray(row).view(np.uint8).data)
    if written != prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{path}: {written} bytes for a {dtype} array of shape {shape}")


def stored_dtype(file: NpyFile) -> StoredDtype:
    """Raises AdapterInvalid when it holds whole numbers."""
    if file.dtype == "int32":
        raise AdapterInvalid(f"{file.path} holds int32; float16, bfloat16 or float32 are needed")
    return file.dtype


def _read_header(path: Path, read: Callable[[int], bytes]) -> tuple[str, int]:
    """(header text, offset of the data)."""
    magic = read(8)
    length_bytes = _LENGTH_BYTES.get(magic[6] if len(magic) == 8 else 0)
    if magic[:6] != b"\x93NUMPY" or length_bytes is None:
        raise AdapterInvalid(f"{path} is no .npy file of version 1, 2 or 3")
    length = int.from_bytes(read(length_bytes), "little")
    if length > _MAX_HEADER_BYTES:
        raise AdapterInvalid(f"{path}: a header of {length} bytes, more than {_MAX_HEADER_BYTES}")
    header = read(length)
    if len(header) != length:
        raise AdapterInvalid(f"{path} is truncated inside its header")
    return header.decode("latin-1"), 8 + length_bytes + length


def _parse(path: Path, header: str) -> tuple[NpyDtype, tuple[int, ...]]:
    match = _HEADER.fullmatch(header)
    if match is None:
        raise AdapterInvalid(f"{path}: its header is not that of a plain array: {header[:120]!r}")
    order, descr, fortran, dimensions = match.groups()
    if descr not in _OF_DESCR or order == ">":
        known = ", ".join(DESCR.values())
        raise AdapterInvalid(f"{path} holds {order + descr}; only {known} are read")
    if fortran == "True":
        raise AdapterInvalid(f"{path} is stored column by column (fortran_order)")
    sizes = [part.strip() for part in dimensions.split(",") if part.strip()]
    if len(sizes) > _MAX_DIMENSIONS or not all(s.isdigit() and len(s) <= 15 for s in sizes):
        raise AdapterInvalid(f"{path}: its shape ({dimensions[:80]}) cannot be meant")
    return _OF_DESCR[descr], tuple(map(int, sizes))
