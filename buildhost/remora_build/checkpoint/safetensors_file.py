"""The header of one safetensors file, distrusted: every size and offset is checked against the file
before a tensor's byte is read. Owns the format; knows no model.

    u64 little-endian n | n bytes of JSON {name: {dtype, shape, data_offsets}} | data
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from remora_contract.errors import CheckpointInvalid, Unsupported

SourceDtype = Literal[
    "BF16", "F16", "F32", "F8_E4M3", "F8_E8M0", "I8", "U8", "I32", "I64"
]  # fmt: skip
FLOATS: frozenset[SourceDtype] = frozenset(("BF16", "F16", "F32"))  # of plain weights
ITEM_BYTES: dict[SourceDtype, int] = {
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    # Of quantized checkpoints: codes, scales, packed words, shapes.
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "I8": 1,
    "U8": 1,
    "I32": 4,
    "I64": 8,
}

# A third of what the format allows, and more than any model has tensors: parsed, a hostile header
# takes 25 times its bytes.
MAX_HEADER_BYTES = 32 << 20
_MAX_RANK = 8
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes are: row-major, little-endian."""

    name: str
    dtype: SourceDtype
    shape: tuple[int, ...]
    path: Path
    offset: int  # from the start of the file, bytes

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def read_entries(path: Path, dtypes: Collection[SourceDtype] = FLOATS) -> dict[str, TensorEntry]:
    """All tensors of the file, none of them read.

    Raises CheckpointInvalid naming the file and tensor (absent, truncated, damaged header),
    Unsupported for a dtype that is not among `dtypes`.
    """
    check_file(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            header = _read_header(path, size, f.read(_LENGTH_BYTES), f.read)
    except FileNotFoundError as e:
        raise CheckpointInvalid(f"{path} is missing; download the checkpoint again") from e
    except OSError as e:
        raise CheckpointInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    data = _LENGTH_BYTES + len(header)
    fields = _decode(path, header)
    entries = [
        _entry(path, name, value, data, dtypes) for name, value in fields if name != "__metadata__"
    ]
    _check_layout(path, entries, data, size)
    return {e.name: e for e in entries}


def is_file(path: Path) -> bool:
    """False where there is nothing. Raises as `check_file`."""
    check_file(path)
    return path.exists()


def check_file(path: Path) -> None:
    """Raises CheckpointInvalid for what is there and no file: a pipe would be waited for, and a
    link to nothing is a file that is missing."""
    if path.is_symlink() and not path.exists():
        raise CheckpointInvalid(f"{path} is a link to nothing; download it again")
    if path.exists() and not path.is_file():
        raise CheckpointInvalid(f"{path} is no file")


def _read_header(path: Path, size: int, length: bytes, read: Callable[[int], bytes]) -> bytes:
    if len(length) < _LENGTH_BYTES:
        raise CheckpointInvalid(f"{path} is truncated: {size} bytes hold no safetensors header")
    n = int.from_bytes(length, "little")
    if n > MAX_HEADER_BYTES:
        raise CheckpointInvalid(
            f"{path}: its header claims {n} bytes, more than {MAX_HEADER_BYTES}: not "
            "safetensors, or no model's"
        )
    if _LENGTH_BYTES + n > size:
        raise CheckpointInvalid(
            f"{path} is truncated: its header alone needs {_LENGTH_BYTES + n} bytes, it has {size}"
        )
    return read(n)


def _decode(path: Path, header: bytes) -> list[tuple[str, Any]]:
    try:
        pairs = json.loads(header, object_pairs_hook=lambda pairs: pairs)
    except (ValueError, RecursionError) as e:
        raise CheckpointInvalid(f"{path}: its header is not JSON: {e}") from e
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) for p in pairs):
        raise CheckpointInvalid(f"{path}: its header is no JSON object")
    if len({name for name, _ in pairs}) != len(pairs):
        raise CheckpointInvalid(f"{path}: its header lists a tensor twice")
    return pairs


def _entry(
    path: Path, name: str, pairs: Any, data: int, dtypes: Collection[SourceDtype]
) -> TensorEntry:
    where = f"{path}: tensor {name[:120]}"
    if not isinstance(pairs, list) or not all(isinstance(p, tuple) for p in pairs):
        raise CheckpointInvalid(f"{where}: its header entry is damaged")
    fields = dict(pairs)
    if set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointInvalid(f"{where}: its header entry has the keys {sorted(fields)}")
    dtype = next((d for d in dtypes if d == fields["dtype"]), None)
    if dtype is None:
        known = ", ".join(sorted(dtypes))
        raise Unsupported(
            f"{where} has dtype {fields['dtype']!r}; only {known} are read: save it in one of "
            "them, or give the original, unquantized checkpoint"
        )
    shape = _naturals(fields["shape"], where, "shape", _MAX_RANK)
    offsets = _naturals(fields["data_offsets"], where, "data_offsets", 2)
    if len(offsets) != 2:
        raise CheckpointInvalid(f"{where}: data_offsets are not two numbers")
    entry = TensorEntry(name, dtype, shape, path, data + offsets[0])
    if offsets[1] - offsets[0] != entry.bytes:
        raise CheckpointInvalid(
            f"{where}: shape {list(shape)} of {entry.dtype} takes {entry.bytes} bytes, "
            f"its offsets say {offsets[1] - offsets[0]}"
        )
    return entry


def _naturals(value: Any, where: str, what: str, most: int) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > most:
        raise CheckpointInvalid(f"{where}: {what} is no list of at most {most} numbers")
    if not all(type(v) is int and 0 <= v < 1 << 48 for v in value):
        raise CheckpointInvalid(f"{where}: {what} {value} are not sizes")
    return tuple(value)


def _check_layout(path: Path, entries: list[TensorEntry], data: int, size: int) -> None:
    """The format allows neither holes nor overlaps; a short file is a broken download."""
    for entry, expected in _with_expected_offset(entries, data):
        if entry.offset != expected:
            raise CheckpointInvalid(f"{path}: tensor {entry.name} overlaps or leaves a hole")
    end = data + sum(e.bytes for e in entries)
    if end > size:
        raise CheckpointInvalid(
            f"{path} is truncated: its header promises {end} bytes, it has {size}; "
            "download it again"
        )
    if end < size:
        raise CheckpointInvalid(f"{path} holds {size - end} bytes that its header does not name")


def _with_expected_offset(
    entries: list[TensorEntry], data: int
) -> Iterator[tuple[TensorEntry, int]]:
    expected = data
    for entry in sorted(entries, key=lambda e: (e.offset, e.bytes)):
        yield entry, expected
        expected += entry.bytes
