"""A file that torch.save wrote, distrusted: its tensors' names, shapes and places, without torch.

    ZIP | NAME/data.pkl: a pickle of {tensor name: tensor} | NAME/data/KEY: bytes, stored plain

Owns the archive, `torch_pickle` what its pickle says; reads no tensor's bytes.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

from remora_build.checkpoint.safetensors_file import ITEM_BYTES, TensorEntry, check_file
from remora_build.checkpoint.torch_pickle import ADVICE, PickledTensor, unpickled
from remora_contract.errors import CheckpointInvalid, Unsupported

MAX_PICKLE_BYTES = 16 << 20
_MAX_MEMBERS = 1 << 20
_LOCAL_HEADER = 30  # bytes of a member's header before its name and extra field
_PICKLE = "data.pkl"
# What zipfile raises, besides its own error, over a damaged directory.
_DAMAGED = (OSError, EOFError, ValueError, RuntimeError, OverflowError, struct.error)


def read_torch_entries(path: Path) -> dict[str, TensorEntry]:
    """All tensors of the file, none of them read.

    Raises CheckpointInvalid (truncated, damaged, or a pickle that names anything but tensors),
    Unsupported for a form or type of tensor that is not read.
    """
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(path, archive)
            state = unpickled(path, _pickle_of(path, archive, members))
            return {name: _entry(path, archive, members, name, t) for name, t in state.items()}
    except zipfile.BadZipFile as e:
        raise CheckpointInvalid(
            f"{path} is no ZIP archive as torch.save writes it (before torch 1.6 it was none, or "
            f"the file is truncated): {ADVICE}"
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
        raise Unsupported(f"{path}: its numbers are not little-endian: {ADVICE}")
    return archive.read(members[_PICKLE])


def _entry(
    path: Path,
    archive: zipfile.ZipFile,
    members: Mapping[str, zipfile.ZipInfo],
    name: str,
    tensor: PickledTensor,
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
