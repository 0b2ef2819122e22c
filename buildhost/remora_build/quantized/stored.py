"""The quantized modules of one checkpoint: which tensors each is made of, checked against the
tool's layout before anything is read, and read as a whole. Knows modules by name, no decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import FLOATS, TensorEntry
from remora_build.checkpoint.stream import TensorStream
from remora_build.quantized.layout import Arrays, Layout, Piece
from remora_build.quantized.matrix import Quantized, problem
from remora_contract.errors import CheckpointInvalid

_WEIGHT = "weight"


@dataclass(frozen=True)
class StoredMatrix:
    """One module's weight [n, k]; `pieces` by suffix."""

    module: str
    layout: Layout
    n: int
    k: int
    pieces: Mapping[str, TensorEntry]

    @property
    def prescaled(self) -> bool:
        return self.layout.prescale in self.pieces

    def read(self, stream: TensorStream, dtype: np.dtype[Any]) -> Quantized:
        """[k, n], fit for a graph of `dtype`. Raises CheckpointInvalid naming the module."""
        arrays: Arrays = {s: stream.whole(self.pieces[s]) for s in self._own()}
        try:
            matrix = self.layout.read(arrays)
        except ValueError as e:
            raise CheckpointInvalid(f"{self.module} {e}") from e
        if matrix.codes.shape != (self.k, self.n) or matrix.scales.shape[1] != self.n:
            raise CheckpointInvalid(
                f"{self.module}: {self.layout.title} has no form for {[self.n, self.k]}"
            )
        why = problem(matrix, dtype)
        if why is not None:
            raise CheckpointInvalid(f"{self.module} {why}")
        return matrix

    def prescale(self, stream: TensorStream) -> NDArray[np.float32] | None:
        """[k], what the input is multiplied by first; None where nothing is."""
        return self._input(self.layout.prescale, stream)

    def input_scale(self, stream: TensorStream) -> float | None:
        """Of the rounded input."""
        values = self._input(self.layout.input_scale, stream)
        return None if values is None else float(values.reshape(-1)[0])

    def digest(self, stream: TensorStream) -> None:
        """Reads what `read` does not, for its digest."""
        own = self._own()
        for suffix, entry in self.pieces.items():
            if suffix not in own:
                stream.digest(entry)

    def global_scale(self, stream: TensorStream) -> float | None:
        """As stored, to compare."""
        values = self._input(self.layout.global_scale, stream)
        return None if values is None else float(values.reshape(-1)[0])

    def _own(self) -> list[str]:
        """The pieces of the weight itself."""
        inputs = (self.layout.prescale, self.layout.input_scale)
        return [suffix for suffix in self.pieces if suffix not in inputs]

    def _input(self, suffix: str | None, stream: TensorStream) -> NDArray[np.float32] | None:
        entry = None if suffix is None else self.pieces.get(suffix)
        if entry is None:
            return None
        values = stream.whole(entry).astype(np.float32)
        if not bool(np.isfinite(values).all()) or not bool((values > 0).all()):
            raise CheckpointInvalid(f"{entry.path}: {entry.name} holds what is no scale")
        return values


def find_stored(
    layout: Layout, modules: Mapping[str, tuple[int, int]], entries: Mapping[str, TensorEntry]
) -> dict[str, StoredMatrix]:
    """The quantized ones among `modules` (path -> n, k). One that has `weight` in a float dtype and
    no other piece of the layout is not quantized.

    Raises CheckpointInvalid naming the tensor that is missing, of another shape or dtype.
    """
    found = {}
    for module, (n, k) in modules.items():
        present = {p.suffix: entries.get(f"{module}.{p.suffix}") for p in layout.pieces}
        pieces = {suffix: e for suffix, e in present.items() if e is not None}
        if _is_plain(pieces):
            continue
        if layout.block is not None and k % layout.block:
            raise CheckpointInvalid(
                f"{module} has {k} inputs, which the blocks of {layout.title} do not divide"
            )
        for piece in layout.pieces:
            _check(layout, piece, module, n, k, pieces.get(piece.suffix))
        found[module] = StoredMatrix(module, layout, n, k, pieces)
    if not found:
        raise CheckpointInvalid(
            f"no module of the checkpoint is stored as {layout.title}, which its config says"
        )
    return found


def _is_plain(pieces: Mapping[str, TensorEntry]) -> bool:
    weight = pieces.get(_WEIGHT)
    return set(pieces) <= {_WEIGHT} and (weight is None or weight.dtype in FLOATS)


def _check(
    layout: Layout, piece: Piece, module: str, n: int, k: int, entry: TensorEntry | None
) -> None:
    name = f"{module}.{piece.suffix}"
    if entry is None:
        if piece.optional:
            return
        raise CheckpointInvalid(f"the checkpoint lacks {name}, a part of {layout.title}")
    shapes = piece.shapes(n, k)
    if entry.dtype not in piece.dtypes or entry.shape not in shapes:
        wanted = " or ".join(str(list(s)) for s in shapes) or "a shape that blocks divide"
        raise CheckpointInvalid(
            f"{entry.path}: {name} is {entry.dtype} {list(entry.shape)}; {layout.title} of "
            f"{[n, k]} has {' or '.join(piece.dtypes)} {wanted}"
        )


def entries_of(stored: Iterable[StoredMatrix]) -> dict[str, TensorEntry]:
    """Every tensor that the modules are made of, by name."""
    return {e.name: e for matrix in stored for e in matrix.pieces.values()}
