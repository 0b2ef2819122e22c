"""Documents <-> frozen dataclasses, strictly: an unknown key, a missing key or a wrong type is an
error that names the key and the file. Owns no document of its own.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any, Literal, TypeVar, Union

from remora_contract.errors import DocumentInvalid

T = TypeVar("T")
_MAX_DEPTH = 64


def parse(cls: type[T], data: object, where: str) -> T:
    """Builds `cls` (a dataclass) from decoded JSON or TOML.

    `where` names the source in errors, for example "bundle.json". Raises DocumentInvalid.
    """
    return typing.cast(T, _value(cls, data, where, "", 0))


def loads(cls: type[T], text: str | bytes, where: str) -> T:
    """Like `parse`, from JSON text. Raises DocumentInvalid when it is not JSON."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DocumentInvalid(f"{where}: not valid JSON: {e}") from e
    return parse(cls, data, where)


def plain(document: object) -> Any:
    """The JSON-ready form of a dataclass tree; fields that are None are left out."""
    if dataclasses.is_dataclass(document) and not isinstance(document, type):
        pairs = ((f.name, getattr(document, f.name)) for f in dataclasses.fields(document))
        return {name: plain(value) for name, value in pairs if value is not None}
    if isinstance(document, dict):
        return {key: plain(value) for key, value in document.items()}
    if isinstance(document, (list, tuple)):
        return [plain(value) for value in document]
    return document


def _value(kind: Any, data: object, where: str, path: str, depth: int) -> object:
    if depth > _MAX_DEPTH:
        raise DocumentInvalid(f"{where}: {path}: nested too deeply")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _optional(arguments, data, where, path, depth)
    if origin is Literal:
        if data not in arguments:
            raise _wrong(where, path, f"one of {', '.join(map(str, arguments))}", data)
        return data
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise _wrong(where, path, "a list", data)
        return tuple(
            _value(arguments[0], v, where, f"{path}[{i}]", depth + 1) for i, v in enumerate(data)
        )
    if origin is dict:
        return _mapping(arguments, data, where, path, depth)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where, path, depth)
    return _scalar(kind, data, where, path)


def _optional(
    arguments: tuple[Any, ...], data: object, where: str, path: str, depth: int
) -> object:
    kinds = [k for k in arguments if k is not type(None)]
    if data is None and len(kinds) < len(arguments):
        return None
    if len(kinds) != 1:
        raise TypeError(f"{path}: only `T | None` unions can be parsed")
    return _value(kinds[0], data, where, path, depth)


def _mapping(arguments: tuple[Any, ...], data: object, where: str, path: str, depth: int) -> object:
    if not isinstance(data, dict):
        raise _wrong(where, path, "a table", data)
    for key in data:
        if not isinstance(key, str):
            raise _wrong(where, path, "string keys", key)
    return {k: _value(arguments[1], v, where, f"{path}.{k}", depth + 1) for k, v in data.items()}


def _dataclass(kind: Any, data: object, where: str, path: str, depth: int) -> object:
    if not isinstance(data, dict):
        raise _wrong(where, path, "a table", data)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for key in data:
        if key not in fields:
            known = ", ".join(sorted(fields))
            raise DocumentInvalid(
                f"{where}: unknown key {_join(path, str(key))!r} (known: {known})"
            )
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], where, _join(path, name), depth + 1)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if type(None) not in typing.get_args(hints[name]):
                raise DocumentInvalid(f"{where}: missing key {_join(path, name)!r}")
            values[name] = None
    try:
        return kind(**values)
    except ValueError as e:
        raise DocumentInvalid(f"{where}: {path or 'document'}: {e}") from e


def _scalar(kind: Any, data: object, where: str, path: str) -> object:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind not in (str, int, float, bool):
        raise TypeError(f"{path}: cannot parse into {kind!r}")
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise _wrong(
            where,
            path,
            {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind],
            data,
        )
    return data


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _wrong(where: str, path: str, need: str, have: object) -> DocumentInvalid:
    return DocumentInvalid(f"{where}: {path or 'document'} must be {need}, not {str(have)[:80]!r}")
