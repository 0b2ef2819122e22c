"""YAML from outside as plain data, within bounds: bytes, depth, and nodes counted as often as
aliases repeat them.

Stricter than `yaml.safe_load`: one document, no tags, no merge keys, no key twice. What looks like
a date stays text. Owns no schema; `remora_contract.strict` has those. Needs pyyaml, which only
build hosts and controllers install.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from remora_contract.errors import DocumentInvalid

MAX_BYTES = 256 << 10
MAX_DEPTH = 32
MAX_NODES = 50_000
_CORE = "tag:yaml.org,2002:"
_NO_KEY = object()


@dataclass
class _Frame:
    """A table or list that is not closed yet."""

    value: dict[Any, Any] | list[Any]
    anchor: str | None
    nodes: int = 1
    key: object = _NO_KEY


def load_yaml(data: bytes, where: str) -> Any:
    """`where` names the source in errors. Raises DocumentInvalid."""
    if len(data) > MAX_BYTES:
        raise DocumentInvalid(f"{where}: larger than {MAX_BYTES >> 10} KiB")
    try:
        text = data.decode()
    except UnicodeDecodeError as e:
        raise DocumentInvalid(f"{where}: not UTF-8: {e}") from e
    try:
        return _Tree(where).read(yaml.SafeLoader(text))
    except yaml.YAMLError as e:
        raise DocumentInvalid(f"{where}: not valid YAML: {' '.join(str(e).split())}") from e


class _Tree:
    """Built from events, without recursion: nesting costs no stack."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._frames: list[_Frame] = []
        self._anchors: dict[str, tuple[object, int]] = {}
        self._root: object = None
        self._documents = 0

    def read(self, loader: Any) -> object:
        """`loader`: a yaml.SafeLoader, whose event methods carry no annotations."""
        try:
            while loader.check_event():
                self._take(loader, loader.get_event())
        finally:
            loader.dispose()
        return self._root

    def _take(self, loader: Any, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                raise self._wrong(event, "holds more than one document")
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            self._open(event)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            frame = self._frames.pop()
            self._add(event, frame.value, frame.nodes, frame.anchor)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise self._wrong(event, f"*{event.anchor} stands for nothing that is complete")
            value, nodes = self._anchors[event.anchor]
            self._add(event, value, nodes, None)
        elif isinstance(event, yaml.ScalarEvent):
            self._add(event, self._scalar(loader, event), 1, event.anchor)

    def _open(self, event: yaml.MappingStartEvent | yaml.SequenceStartEvent) -> None:
        self._check_tag(event)
        if len(self._frames) >= MAX_DEPTH:
            raise self._wrong(event, f"nested deeper than {MAX_DEPTH}")
        empty: dict[Any, Any] | list[Any] = {}
        if isinstance(event, yaml.SequenceStartEvent):
            empty = []
        self._frames.append(_Frame(empty, event.anchor))

    def _add(self, event: yaml.Event, value: object, nodes: int, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = (value, nodes)
        if not self._frames:
            self._root = value
            return
        frame = self._frames[-1]
        frame.nodes += nodes
        if frame.nodes > MAX_NODES:
            raise self._wrong(event, f"more than {MAX_NODES} values, aliases written out")
        if isinstance(frame.value, list):
            frame.value.append(value)
        elif frame.key is _NO_KEY:
            frame.key = self._key(event, frame.value, value)
        else:
            frame.value[frame.key] = value
            frame.key = _NO_KEY

    def _key(self, event: yaml.Event, table: dict[Any, Any], key: object) -> object:
        if not isinstance(key, Hashable):
            raise self._wrong(event, "a table's key must be text")
        if key in table:
            raise self._wrong(event, f"key {str(key)[:80]!r} is there twice")
        return key

    def _scalar(self, loader: Any, event: yaml.ScalarEvent) -> object:
        self._check_tag(event)
        tag = loader.resolve(yaml.ScalarNode, event.value, event.implicit).removeprefix(_CORE)
        if tag == "merge":
            raise self._wrong(event, "merge keys (<<) are not read; write the values out")
        node = yaml.ScalarNode(_CORE + tag, event.value)
        try:
            if tag == "null":
                return None
            if tag == "bool":
                return loader.construct_yaml_bool(node)
            if tag == "int":
                return loader.construct_yaml_int(node)
            return loader.construct_yaml_float(node) if tag == "float" else event.value
        except ValueError as e:  # more digits than Python reads
            raise self._wrong(event, f"{event.value[:40]!r} is no number") from e

    def _check_tag(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.tag is not None:
            raise self._wrong(event, f"tags ({event.tag[:80]}) are not read; leave them out")

    def _wrong(self, event: yaml.Event, what: str) -> DocumentInvalid:
        line = 0 if event.start_mark is None else event.start_mark.line + 1
        return DocumentInvalid(f"{self._where}: line {line}: {what}")
