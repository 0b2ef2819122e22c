"""What a pickle of tensors describes, without torch: names, storages, shapes and places.

A pickle is a program. This one may name an ordered dictionary, torch's two functions that put a
tensor together and the classes of its storages, and nothing else: none of them runs torch's code
or anybody's, and what they make is a description. It is run by Python's own unpickler in Python:
the one in C takes memory by the numbers it reads (a memo of 2^32 places), and crashes over a key of
a million tuples.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from remora_build.checkpoint.safetensors_file import SourceDtype
from remora_contract.errors import CheckpointInvalid, Unsupported

ADVICE = "save the adapter with safetensors (save_pretrained's default)"

_MAX_RANK = 8
_STORAGES: Mapping[str, SourceDtype] = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
}
# All that pickles of tensors are made of, at any protocol.
_OPCODES = b"(.GFIJKMLN}dsu)t]aecRbQPpqrghjVXSU012" + bytes(
    (*range(0x85, 0x8C), 0x80, 0x8C, 0x93, 0x94, 0x95)
)


@dataclass(frozen=True)
class Storage:
    dtype: SourceDtype
    key: str
    items: int


@dataclass(frozen=True)
class PickledTensor:
    """Rows `shape` of a storage from item `offset` on, one after the other."""

    storage: Storage
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


def unpickled(path: Path, data: bytes) -> dict[str, PickledTensor]:
    """Raises CheckpointInvalid for a program that makes anything else, Unsupported for a form or
    type of tensor that is not read. `path` is named in errors."""
    try:
        state = _Unpickler(io.BytesIO(data)).load()
    except Unsupported:
        raise
    except Exception as e:  # a hostile program may end in any of Python's errors
        raise CheckpointInvalid(
            f"{path}: its pickle is damaged or holds more than tensors, and is not run: "
            f"{str(e)[:200]}; {ADVICE}"
        ) from e
    if not isinstance(state, dict):
        raise CheckpointInvalid(f"{path}: holds no table of tensors by name")
    for name, tensor in state.items():
        if not isinstance(tensor, PickledTensor):
            raise CheckpointInvalid(f"{path}: entry {name[:120]!r} is no tensor")
    return dict(state)


class _Opcodes(dict[int, Callable[[Any], None]]):
    def __missing__(self, opcode: int) -> NoReturn:
        raise pickle.UnpicklingError(f"it has the opcode {bytes([opcode])!r}")


class _Unpickler(pickle._Unpickler):
    """Tables have text for keys, and nothing that was made is changed."""

    # Its own, that no stub declares.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    dispatch = _Opcodes(
        {code: run for code, run in pickle._Unpickler.dispatch.items() if code in _OPCODES}
    )

    def _set(self, pairs: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict) or not all(type(key) is str for key in pairs[::2]):
            raise pickle.UnpicklingError("it has a table whose keys are no text")
        table.update(zip(pairs[::2], pairs[1::2], strict=True))

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _set_items(self) -> None:
        self._set(self.pop_mark())

    def _make_table(self) -> None:
        pairs = self.pop_mark()
        self.append({})
        self._set(pairs)

    def _leave(self) -> None:
        """The attributes that torch sets on a state's dictionary say nothing of its tensors."""
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            raise pickle.UnpicklingError("it changes what it may only make")

    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.DICT[0]] = _make_table
    dispatch[pickle.BUILD[0]] = _leave

    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get((module, name))
        if allowed is not None:
            return allowed
        if module == "torch" and name.endswith("Storage"):
            raise Unsupported(f"tensors of torch.{name[:40]} are not read: {ADVICE}")
        raise pickle.UnpicklingError(f"it names {module[:80]}.{name[:80]}")

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a storage is described in another way than torch's")
        kind, key, items = pid[1], pid[2], pid[4]
        if not isinstance(kind, _StorageType) or not isinstance(key, str) or type(items) is not int:
            raise pickle.UnpicklingError("a storage is described in another way than torch's")
        return Storage(kind.dtype, key, items)


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, *hooks: Any
) -> PickledTensor:
    """torch._utils._rebuild_tensor_v2"""
    sizes = (*shape, *stride, offset) if isinstance(shape, tuple) else ()
    if not isinstance(storage, Storage) or len(stride) != len(shape) or len(shape) > _MAX_RANK:
        raise pickle.UnpicklingError("a tensor is described in another way than torch's")
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in sizes) or not sizes:
        raise pickle.UnpicklingError("a tensor's sizes are no sizes")
    step = 1
    for size, have in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and have != step and prod(shape):
            raise Unsupported(f"a tensor of shape {list(shape)} lies transposed in it: {ADVICE}")
        step *= size
    return PickledTensor(storage, offset, shape)


def _parameter(data: Any, requires_grad: Any, hooks: Any) -> Any:
    """torch._utils._rebuild_parameter"""
    return data


def _state() -> OrderedDict[str, Any]:
    return OrderedDict()


_ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Callable(_state),
    ("torch._utils", "_rebuild_tensor_v2"): _Callable(_tensor),
    ("torch._utils", "_rebuild_parameter"): _Callable(_parameter),
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
}
