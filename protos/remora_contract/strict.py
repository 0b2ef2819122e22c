"""Documents <-> frozen dataclasses, strictly: an unknown key, a missing key or a wrong type is an
error that names the key and the file. So is what could not be written again in canonical form: a
number that is not finite, text that is not Unicode, nesting without end. Owns no document.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from typing import Any, Literal, TypeVar, Union

from remora_contract.errors import DocumentInvalid

T = TypeVar("T")
_MAX_DEPTH = 64
_NEEDED = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


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
        return _anything(data, where, path, depth)
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


def _anything(data: object, where: str, path: str, depth: int) -> object:
    """Data without a schema, kept as it is."""
    if isinstance(data, dict):
        return _mapping((str, Any), data, where, path, depth)
    if isinstance(data, list):
        return [_value(Any, v, where, f"{path}[{i}]", depth + 1) for i, v in enumerate(data)]
    if isinstance(data, (str, float)):
        return _scalar(type(data), data, where, path)
    return data


def _mapping(arguments: tuple[Any, ...], data: object, where: str, path: str, depth: int) -> object:
    if not isinstance(data, dict):
        raise _wrong(where, path, "a table", data)
    for key in data:
        if not isinstance(key, str) or not _is_unicode(key):
            raise _wrong(where, path, "string keys", key)
    return {k: _value(arguments[1], v, where, _join(path, k), depth + 1) for k, v in data.items()}


_type_hints = functools.cache(typing.get_type_hints)  # slow, and asked for every entry of a list


def _dataclass(kind: Any, data: object, where: str, path: str, depth: int) -> object:
    if not isinstance(data, dict):
        raise _wrong(where, path, "a table", data)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = _type_hints(kind)
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
    except (ValueError, DocumentInvalid) as e:
        raise DocumentInvalid(f"{where}: {path or 'document'}: {e}") from e


def _scalar(kind: Any, data: object, where: str, path: str) -> object:
    if kind not in _NEEDED:
        raise TypeError(f"{path}: cannot parse into {kind!r}")
    wanted = (int, float) if kind is float else kind
    if not isinstance(data, wanted) or (kind is not bool and isinstance(data, bool)):
        raise _wrong(where, path, _NEEDED[kind], data)
    if kind is float:
        return _finite(data, where, path)
    if isinstance(data, str) and not _is_unicode(data):
        raise _wrong(where, path, "Unicode text", data)
    return data


def _finite(data: Any, where: str, path: str) -> float:
    try:
        number = float(data)
    except OverflowError as e:
        raise _wrong(where, path, "a finite number", data) from e
    if not math.isfinite(number):
        raise _wrong(where, path, "a finite number", data)
    return number


def _is_unicode(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _wrong(where: str, path: str, need: str, have: object) -> DocumentInvalid:
    return DocumentInvalid(f"{where}: {path or 'document'} must be {need}, not {str(have)[:80]!r}")
