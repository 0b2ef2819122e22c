"""KServe tensors <-> Python values. Pure; sizes are checked before anything is unpacked.

A request's values travel either in `raw_input_contents` (little endian, one blob for each input;
each BYTES element behind its length in 4 bytes) or in the inputs' own `contents`, never mixed.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remora_contract.errors import RequestInvalid
from remora_protos.kserve.v2 import grpc_service_pb2 as pb

MAX_ELEMENTS = 4096  # of one tensor
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class _Datatype:
    contents: str  # field of InferTensorContents
    code: str  # of `struct`; empty: BYTES


_DATATYPES = {
    "BOOL": _Datatype("bool_contents", "?"),
    "INT32": _Datatype("int_contents", "i"),
    "INT64": _Datatype("int64_contents", "q"),
    "UINT32": _Datatype("uint_contents", "I"),
    "UINT64": _Datatype("uint64_contents", "Q"),
    "FP32": _Datatype("fp32_contents", "f"),
    "FP64": _Datatype("fp64_contents", "d"),
    "BYTES": _Datatype("bytes_contents", ""),
}


@dataclass(frozen=True)
class Tensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    values: tuple[Any, ...]  # flat: bool, int, float or bytes


def input_tensors(request: pb.ModelInferRequest, max_inputs: int) -> list[Tensor]:
    """Raises RequestInvalid naming the input whose name, datatype, shape or bytes are wrong."""
    inputs, raw = request.inputs, request.raw_input_contents
    if len(inputs) > max_inputs:
        raise RequestInvalid(f"inputs: at most {max_inputs}, not {len(inputs)}")
    if raw and len(raw) != len(inputs):
        raise RequestInvalid(
            f"raw_input_contents: one for each of the {len(inputs)} inputs, not {len(raw)}; the "
            "values of a request are all raw or all in contents"
        )
    seen: set[str] = set()
    for given in inputs:
        if given.name in seen:
            raise RequestInvalid(f"input {given.name[:80]!r} is given twice")
        seen.add(given.name)
    return [_tensor(given, raw[i] if raw else None) for i, given in enumerate(inputs)]


def _tensor(given: Any, raw: bytes | None) -> Tensor:
    where = f"input {given.name[:80]!r}"
    datatype = _DATATYPES.get(given.datatype)
    if datatype is None:
        known = ", ".join(_DATATYPES)
        raise RequestInvalid(f"{where}: datatype {given.datatype[:20]!r} is not one of {known}")
    count = _count(tuple(given.shape), where)
    if raw is None:
        values = _contents(given, datatype, where)
    else:
        if given.HasField("contents"):
            raise RequestInvalid(f"{where}: contents are given beside raw_input_contents")
        values = _unpacked(raw, datatype, given.datatype, count, where)
    if len(values) != count:
        shape = list(given.shape)
        raise RequestInvalid(f"{where}: shape {shape} holds {count} values, not {len(values)}")
    return Tensor(given.name, given.datatype, tuple(given.shape), values)


def _count(shape: tuple[int, ...], where: str) -> int:
    if not 0 < len(shape) <= 2 or min(shape) < 0:
        raise RequestInvalid(f"{where}: shape {list(shape)[:8]} must be [n] or [1, n]")
    count = math.prod(shape)
    if max(shape) > MAX_ELEMENTS or count > MAX_ELEMENTS:
        raise RequestInvalid(f"{where}: at most {MAX_ELEMENTS} values, not shape {list(shape)}")
    return count


def _contents(given: Any, datatype: _Datatype, where: str) -> tuple[Any, ...]:
    wrong = [f.name for f, _ in given.contents.ListFields() if f.name != datatype.contents]
    if wrong:
        raise RequestInvalid(
            f"{where}: values of {given.datatype} stand in {datatype.contents}, not {wrong[0]}"
        )
    values = getattr(given.contents, datatype.contents)
    return tuple(values[: MAX_ELEMENTS + 1])


def _unpacked(
    raw: bytes, datatype: _Datatype, name: str, count: int, where: str
) -> tuple[Any, ...]:
    if not datatype.code:
        return _byte_strings(raw, where)
    size = count * struct.calcsize("<" + datatype.code)
    if len(raw) != size:
        raise RequestInvalid(f"{where}: {count} values of {name} are {size} bytes, not {len(raw)}")
    return struct.unpack(f"<{count}{datatype.code}", raw)


def _byte_strings(raw: bytes, where: str) -> tuple[bytes, ...]:
    found: list[bytes] = []
    at = 0
    while at < len(raw):
        if len(found) > MAX_ELEMENTS:
            raise RequestInvalid(f"{where}: at most {MAX_ELEMENTS} values")
        end = at + _LENGTH.size
        if end > len(raw):
            raise RequestInvalid(f"{where}: the raw bytes end within a length")
        (length,) = _LENGTH.unpack_from(raw, at)
        if end + length > len(raw):
            raise RequestInvalid(f"{where}: the raw bytes end within a value of {length} bytes")
        found.append(raw[end : end + length])
        at = end + length
    return tuple(found)


def add_output(
    response: pb.ModelInferResponse, name: str, datatype: str, values: Sequence[Any]
) -> None:
    """Appends one output of shape [len(values)] in raw form; text goes as UTF-8."""
    response.outputs.add(name=name, datatype=datatype, shape=[len(values)])
    code = _DATATYPES[datatype].code
    if code:
        response.raw_output_contents.append(struct.pack(f"<{len(values)}{code}", *values))
        return
    blobs = [value.encode() for value in values]
    response.raw_output_contents.append(b"".join(_LENGTH.pack(len(b)) + b for b in blobs))
