"""A checkpoint as the base's weights: exact, and proven to be the bundle's base by its digest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.base import Advance, Array, Blocks, Rows, Table, same_rows, silent
from remora_build.adapters.bound import NormPlace
from remora_build.adapters.modules import Parts
from remora_build.checkpoint.directory import find_tensors
from remora_build.checkpoint.inventory import base_digest, take_inventory
from remora_build.checkpoint.stream import TensorStream
from remora_build.families import left_out_of, naming, read_config
from remora_contract.bundle import Bundle
from remora_contract.digests import short
from remora_contract.errors import Refused


class CheckpointBase:
    """Reads rows panel by panel and hashes what it reads; `confirm` reads the rest."""

    def __init__(self, directory: Path, bundle: Bundle) -> None:
        """Raises CheckpointInvalid, Unsupported, and Refused for another architecture."""
        self.advance: Advance = silent
        self._directory = directory
        self._bundle = bundle
        spec, entries = read_config(directory), find_tensors(directory)
        if spec != bundle.decoder:
            raise Refused(f"{directory} is not the base of the bundle: its config.json differs")
        self._inventory = take_inventory(naming(spec, entries), entries, left_out_of(directory))
        self._stream = TensorStream()

    @property
    def bytes(self) -> int:
        """What `confirm` will have read."""
        return sum(e.bytes for e in self._inventory.tensors.values())

    def __enter__(self) -> CheckpointBase:
        self._stream.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.__exit__(kind, error, trace)

    def weight(self, parts: Parts) -> Blocks:
        target, names = parts[0].target, self._inventory.naming
        if target.projection == "embed":
            for first, rows in self._rows(names.embedding):
                yield 0, first, rows.T
            return
        if target.projection == "head":
            tensor = self._table("head")
        else:
            tensor = names.weight(target.layer, target.projection).tensor
        for first, rows in self._rows(tensor):
            yield first, 0, rows

    def bias(self, parts: Parts) -> Array:
        target = parts[0].target
        return self._vector(self._inventory.naming.bias(target.layer, target.projection).tensor)

    def norm_bias(self, place: NormPlace) -> Array:
        names = self._inventory.naming
        if place.layer is None or place.norm is None:
            return self._vector(names.final_norm_bias)
        return self._vector(names.norm_bias(place.layer, place.norm))

    def rows(self, table: Table, tokens: tuple[int, ...]) -> Array:
        found = np.empty((len(tokens), self._bundle.decoder.hidden), np.float32)
        for first, block in self._rows(self._table(table)):
            for i, token in enumerate(tokens):
                if first <= token < first + len(block):
                    found[i] = block[token - first]
        return found

    def is_copy(self, table: Table, copy: Rows) -> bool:
        return same_rows((rows for _, rows in self._panels(self._table(table))), copy)

    def confirm(self) -> None:
        tensors = self._inventory.tensors
        for name, entry in tensors.items():
            if name not in self._stream.digests:
                self._stream.digest(entry)
                self.advance(entry.bytes)
        digest = base_digest(self._bundle.decoder, tensors, self._stream.digests)
        if digest != self._bundle.base_digest:
            raise Refused(
                f"{self._directory} is not the base of the bundle: its weights are "
                f"{short(digest)}, the bundle's {short(self._bundle.base_digest)}"
            )

    def _table(self, table: Table) -> str:
        names, tied = self._inventory.naming, self._bundle.decoder.tied_embeddings
        return names.embedding if table == "embed" or tied else names.head

    def _vector(self, tensor: str) -> Array:
        return self._stream.whole(self._inventory.tensors[tensor]).astype(np.float32)

    def _rows(self, tensor: str) -> Iterator[tuple[int, Array]]:
        for first, rows in self._panels(tensor):
            yield first, rows.astype(np.float32)

    def _panels(self, tensor: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """(first row, rows in the checkpoint's type), hashed on the way."""
        seen = tensor in self._stream.digests
        for first, rows in self._stream.rows(self._inventory.tensors[tensor]):
            if not seen:
                self.advance(rows.nbytes)
            yield first, rows
