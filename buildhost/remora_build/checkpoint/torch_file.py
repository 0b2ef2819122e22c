"""A file that torch.save wrote, distrusted: its tensors' names, shapes and places, without torch.

    ZIP | NAME/data.pkl: a pickle of {tensor name: tensor} | NAME/data/KEY: bytes, stored plain

A pickle is a program. This one may name an ordered dictionary, torch's two functions that put a
tensor together and the classes of its storages, and nothing else: none of them runs torch's code
or anybody's, and what they make is a description. Owns the format; reads no tensor's bytes.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from remora_build.checkpoint.safetensors_file import ITEM_BYTES, SourceDtype, TensorEntry
from remora_contract.errors import CheckpointInvalid, Unsupported

MAX_PICKLE_BYTES = 16 << 20
_MAX_MEMBERS = 1 << 20
_MAX_RANK = 8
_LOCAL_HEADER = 30  # bytes of a member's header before its name and extra field
_PICKLE = "data.pkl"
_STORAGES: Mapping[str, SourceDtype] = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
}
# What zipfile raises, besides its own error, over a damaged directory.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, OverflowError, struct.error)
_ADVICE = "save the adapter with safetensors (save_pretrained's default)"


@dataclass(frozen=True)
class _Storage:
    dtype: SourceDtype
    key: str
    items: int


@dataclass(frozen=True)
class _Tensor:
    """Rows `shape` of a storage from item `offset` on, one after the other."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]


class _Callable:
    """What a pickle may call. Without attributes, so that none can be set on it."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError("it changes what it may only call")


@dataclass(frozen=True)
class _StorageType:
    dtype: SourceDtype


def read_torch_entries(path: Path) -> dict[str, TensorEntry]:
    """All tensors of the file, none of them read.

    Raises CheckpointInvalid (truncated, damaged, or a pickle that names anything but tensors),
    Unsupported for a form or type of tensor that is not read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            state = _unpickled(path, _pickle_of(path, archive, members))
            return {name: _entry(path, archive, members, name, t) for name, t in state.items()}
    except zipfile.BadZipFile as e:
        raise CheckpointInvalid(
            f"{path} is no ZIP archive as torch.save writes it (before torch 1.6 it was none, or "
            f"the file is truncated): {_ADVICE}"
        ) from e
    except _DAMAGED as e:
        raise CheckpointInvalid(f"{path} cannot be read: {e}") from e


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Name below the archive's one folder -> member. All are stored plain, so none can unfold."""
    infos = archive.infolist()
    if len(infos) > _MAX_MEMBERS:
        raise CheckpointInvalid(f"{path}: more than {_MAX_MEMBERS} members")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in members:
            raise CheckpointInvalid(f"{path}: two members are called {name[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointInvalid(
                f"{path}: member {info.filename[:80]!r} is compressed or encrypted; torch.save "
                "never does that"
            )
        members[name] = info
    return members


def _pickle_of(path: Path, archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> bytes:
    if _PICKLE not in members:
        raise CheckpointInvalid(f"{path}: has no {_PICKLE}: torch.save did not write it")
    size = members[_PICKLE].file_size
    if size > MAX_PICKLE_BYTES:
        raise CheckpointInvalid(f"{path}: {_PICKLE} has {size} bytes, more than {MAX_PICKLE_BYTES}")
    order = members.get("byteorder")
    if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
        raise Unsupported(f"{path}: its numbers are not little-endian: {_ADVICE}")
    return archive.read(members[_PICKLE])


def _unpickled(path: Path, data: bytes) -> dict[str, _Tensor]:
    try:
        state = _Unpickler(io.BytesIO(data)).load()
    except Unsupported:
        raise
    except Exception as e:  # a hostile program may end in any of Python's errors
        raise CheckpointInvalid(
            f"{path}: its pickle is damaged or holds more than tensors, and is not run: "
            f"{str(e)[:200]}; {_ADVICE}"
        ) from e
    if not isinstance(state, dict):
        raise CheckpointInvalid(f"{path}: holds no table of tensors by name")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            raise CheckpointInvalid(f"{path}: entry {str(name)[:120]!r} is no tensor")
    return dict(state)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is not None:
            return allowed
        if module == "torch" and name.endswith("Storage"):
            raise Unsupported(f"tensors of torch.{name[:40]} are not read: {_ADVICE}")
        raise pickle.UnpicklingError(f"it names {module[:80]}.{name[:80]}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a storage is described in another way than torch's")
        kind, key, items = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or type(items) is not int:
            raise pickle.UnpicklingError("a storage is described in another way than torch's")
        return _Storage(kind.dtype, key, items)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, *hooks: Any
) -> _Tensor:
    """torch._utils._rebuild_tensor_v2"""
    sizes = (*shape, *stride, offset) if isinstance(shape, tuple) else ()
    if not isinstance(storage, _Storage) or len(stride) != len(shape) or len(shape) > _MAX_RANK:
        raise pickle.UnpicklingError("a tensor is described in another way than torch's")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes) or not sizes:
        raise pickle.UnpicklingError("a tensor's sizes are no sizes")
    step = 1
    for size, have in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and have != step and prod(shape):
            raise Unsupported(f"a tensor of shape {list(shape)} lies transposed in it: {_ADVICE}")
        step *= size
    return _Tensor(storage, offset, shape)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    """torch._utils._rebuild_parameter"""
    return data


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable(_parameter),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}


def _entry(
    path: Path,
    archive: zipfile.ZipFile,
    members: Mapping[str, zipfile.ZipInfo],
    name: str,
    tensor: _Tensor,
) -> TensorEntry:
    storage = tensor.storage
    info = members.get(f"data/{storage.key}")
    if info is None:
        raise CheckpointInvalid(f"{path}: tensor {name[:120]} lies in a member that is missing")
    item = ITEM_BYTES[storage.dtype]
    end = (tensor.offset + prod(tensor.shape)) * item
    if end > info.file_size:
        raise CheckpointInvalid(
            f"{path}: tensor {name[:120]} {list(tensor.shape)} needs {end} bytes of its storage, "
            f"which has {info.file_size}"
        )
    start = _data_offset(path, archive, info)
    return TensorEntry(name, storage.dtype, tensor.shape, path, start + tensor.offset * item)


def _data_offset(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Where a stored member's bytes begin: its local header tells, and the file must hold them."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    header = archive.fp.read(_LOCAL_HEADER)
    if len(header) < _LOCAL_HEADER or header[:4] != b"PK\x03\x04":
        raise CheckpointInvalid(f"{path}: member {info.filename[:80]!r} has no header")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = info.header_offset + _LOCAL_HEADER + lengths
    if start + info.file_size > path.stat().st_size:
        raise CheckpointInvalid(f"{path} is truncated within {info.filename[:80]!r}")
    return start
