"""How much of an ONNX file is structure, read off the wire before anything is parsed.

Parsing turns two bytes of a hostile protobuf into hundreds; the raw bytes of weights stay what they
are. So everything but the initializers' `raw_data` is bounded first. Knows the numbers of four
fields; judges nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

from remora_contract.errors import InvalidInput

MAX_MODEL_BYTES = (1 << 31) - 1  # protobuf's own limit
MAX_STRUCTURE_BYTES = 128 << 20
_MAX_FIELDS = 1 << 19

_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10


def check_structure(data: memoryview, where: str) -> None:
    """Raises InvalidInput when `data` is no ONNX model or has more structure than any decoder."""
    budget = _Fields(where)
    weights = 0
    for number, graph in budget.of(data):
        if number != _MODEL_GRAPH:
            continue
        for field, tensor in budget.of(graph):
            if field == _GRAPH_INITIALIZER:
                weights += sum(len(d) for f, d in budget.of(tensor) if f == _TENSOR_RAW_DATA)
    if len(data) - weights > MAX_STRUCTURE_BYTES:
        raise InvalidInput(
            f"{where}: {len(data) - weights} bytes beside the raw data of its initializers, more "
            f"than {MAX_STRUCTURE_BYTES}: save it again with its weights as external data"
        )


class _Fields:
    """Counts all fields that it yields, whatever message they belong to."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._left = _MAX_FIELDS

    def of(self, message: memoryview) -> Iterator[tuple[int, memoryview]]:
        """(number, bytes) of each length-delimited field of a message; others are stepped over."""
        at = 0
        while at < len(message):
            self._left -= 1
            if self._left < 0:
                raise InvalidInput(f"{self._where}: more than {_MAX_FIELDS} fields in its graph")
            key, at = self._varint(message, at)
            size, at = self._size(key & 7, message, at)
            if size > len(message) - at:
                raise self._damaged()
            if key & 7 == _BYTES:
                yield key >> 3, message[at : at + size]
            at += size

    def _size(self, wire_type: int, message: memoryview, at: int) -> tuple[int, int]:
        """Bytes of the field's value, and where it begins."""
        if wire_type == _VARINT:
            return 0, self._varint(message, at)[1]
        if wire_type == _BYTES:
            return self._varint(message, at)
        fixed = {_FIXED64: 8, _FIXED32: 4}.get(wire_type)
        if fixed is None:
            raise self._damaged()
        return fixed, at

    def _varint(self, message: memoryview, at: int) -> tuple[int, int]:
        value = 0
        for i, byte in enumerate(message[at : at + _MAX_VARINT_BYTES]):
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                return value, at + i + 1
        raise self._damaged()

    def _damaged(self) -> InvalidInput:
        return InvalidInput(f"{self._where} is no ONNX model, or it is truncated")
