"""A bundle as the base's weights: what its data file holds unquantized, in the bundle's dtype.

Most conversions ask nothing of it, so what reads graphs is imported inside the questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.base import Array, Blocks, Rows, Table, same_rows
from remora_build.adapters.bound import NormPlace
from remora_build.adapters.modules import Parts
from remora_contract.bundle import GRAPH_FILE, Bundle
from remora_contract.errors import ArtifactInvalid, Refused
from remora_contract.targets import PARTS, Projection

if TYPE_CHECKING:
    import onnx_ir as ir

_CHUNK_BYTES = 4 << 20


class BundleBase:
    """The graph file is read at the first question."""

    def __init__(self, directory: Path, bundle: Bundle) -> None:
        self._directory = directory
        self._bundle = bundle
        self._found: dict[str, ir.ExternalTensor] | None = None

    def __enter__(self) -> BundleBase:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._found = None

    def weight(self, parts: Parts) -> Blocks:
        from remora_build.graph import layout

        target = parts[0].target
        if target.projection == "embed":
            for first, rows in self._chunks(layout.EMBED):
                yield 0, first, rows.T
            return
        if target.projection == "head":
            yield from self._head()
            return
        begin, end = self._columns(parts)
        for first, rows in self._chunks(layout.group_weight(target.layer, target.group)):
            yield 0, first, rows[:, begin:end].T

    def bias(self, parts: Parts) -> Array:
        from remora_build.graph import layout

        target = parts[0].target
        begin, end = self._columns(parts)
        return self._vector(layout.group_bias(target.layer, target.group))[begin:end]

    def norm_bias(self, place: NormPlace) -> Array:
        return self._vector(f"{place.stem}.bias")

    def rows(self, table: Table, tokens: tuple[int, ...]) -> Array:
        found = np.empty((len(tokens), self._bundle.decoder.hidden), np.float32)
        for first, _, block in self._table(table):
            for i, token in enumerate(tokens):
                if first <= token < first + len(block):
                    found[i] = block[token - first]
        return found

    def is_copy(self, table: Table, copy: Rows) -> bool:
        dtype = np.dtype(self._bundle.graph.dtype)
        return same_rows((block.astype(dtype) for _, _, block in self._table(table)), copy)

    def confirm(self) -> None:
        """It is the bundle."""

    def _table(self, table: Table) -> Blocks:
        """[some tokens, hidden] after each other."""
        from remora_build.graph import layout

        if table == "embed" or not layout.has_head(self._bundle.decoder, self._bundle.graph):
            for first, rows in self._chunks(layout.EMBED):
                yield first, 0, rows
            return
        whole = self._stored(layout.HEAD)  # [hidden, vocab]: a token's row is a column
        width = max(1, _CHUNK_BYTES // (4 * whole.shape[0]))
        for first in range(0, whole.shape[1], width):
            block = whole[:, first : first + width]
            yield first, 0, np.ascontiguousarray(block.T, np.float32)

    def _head(self) -> Blocks:
        from remora_build.graph import layout

        if layout.has_head(self._bundle.decoder, self._bundle.graph):
            for first, rows in self._chunks(layout.HEAD):
                yield 0, first, rows.T
        else:
            yield from self._table("embed")

    def _columns(self, parts: Parts) -> tuple[int, int]:
        """Where a module's outputs lie in its packed group."""
        target, before = parts[0].target, 0
        group: tuple[Projection, ...] = PARTS[target.group]
        for projection in group[: group.index(target.projection)]:
            before += self._bundle.decoder.out_features(projection)
        return before, before + max(p.end for p in parts)

    def _vector(self, name: str) -> Array:
        return np.asarray(self._stored(name), np.float32).reshape(-1)

    def _chunks(self, name: str) -> Iterator[tuple[int, Array]]:
        whole = self._stored(name)
        step = max(1, _CHUNK_BYTES // (4 * whole.shape[1]))
        for first in range(0, len(whole), step):
            yield first, np.asarray(whole[first : first + step], np.float32)

    def _stored(self, name: str) -> NDArray[np.floating]:
        """An initializer as it lies in the data file, mapped: only what is looked at is read."""
        if self._found is None:
            self._found = _external(self._directory / GRAPH_FILE)
        tensor = self._found.get(name)
        if tensor is None:
            raise Refused(
                f"the bundle holds {name} quantized: give the checkpoint it was exported from with "
                "--checkpoint"
            )
        path = self._directory / tensor.location
        dtype, count = tensor.dtype.numpy(), int(np.prod(tensor.shape.numpy()))
        try:
            mapped = np.memmap(path, dtype, "r", tensor.offset or 0, shape=(count,))
        except (OSError, ValueError) as e:
            raise ArtifactInvalid(f"{path} is shorter than the graph says, or damaged: {e}") from e
        return mapped.reshape(tensor.shape.numpy())


def _external(path: Path) -> dict[str, ir.ExternalTensor]:
    """The float initializers in the data file, by name. Raises ArtifactInvalid."""
    import onnx_ir as ir  # takes longer than all of a plain conversion

    try:
        model = ir.load(path)
    except Exception as e:  # onnx_ir's and protobuf's errors share no base class
        raise ArtifactInvalid(f"{path} is no graph: {e}") from e
    floats = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.dtype in floats
    }
