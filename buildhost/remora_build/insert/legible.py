"""Whether all names in a model are text. ONNX is of protobuf's second edition, which does not ask:
for what is no UTF-8 it gives bytes where everybody expects text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from remora_contract.errors import InvalidInput

_TENSOR = "TensorProto"
_TENSOR_TEXTS = ("name", "doc_string")  # listing all of its fields would copy its data


def check_text(proto: Any, where: str) -> None:
    """Raises InvalidInput naming the kind of thing that has such a name."""
    waiting = [proto]
    while waiting:
        message = waiting.pop()
        for field, value in _fields(message):
            for item in [value] if isinstance(value, str | bytes) else value:
                if isinstance(item, bytes):
                    kind = message.DESCRIPTOR.name.removesuffix("Proto").lower()
                    raise InvalidInput(f"{where}: the {field} of a {kind} is no UTF-8: damaged?")
                if not isinstance(item, str):
                    waiting.append(item)


def _fields(message: Any) -> Iterator[tuple[str, Iterable[Any]]]:
    """(name, value or values) of its texts and messages."""
    if message.DESCRIPTOR.name == _TENSOR:
        yield from ((name, getattr(message, name)) for name in _TENSOR_TEXTS)
        yield "external_data", message.external_data
        return
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield field.name, value
        elif field.type == field.TYPE_MESSAGE:
            yield field.name, [value] if hasattr(value, "ListFields") else value
