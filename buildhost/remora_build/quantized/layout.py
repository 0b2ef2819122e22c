"""How a tool stores one linear module: which tensors, of which dtype and shape, and how they become
a `Quantized`. A format is one small file beside this one that makes Layouts. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from remora_build.checkpoint.safetensors_file import SourceDtype
from remora_build.graph.forms import Kind
from remora_build.quantized.matrix import Quantized

Shape = tuple[int, ...]
Arrays = Mapping[str, NDArray[Any]]  # what was read, by the piece's suffix
FLOAT: tuple[SourceDtype, ...] = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Piece:
    """One tensor `MODULE.suffix` of a module's. `shapes(n, k)` are those it may have."""

    suffix: str
    dtypes: tuple[SourceDtype, ...]
    shapes: Callable[[int, int], tuple[Shape, ...]]
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """`read` gets every piece that is there; it raises ValueError, in words for people, when they
    do not agree. `prescale`, `input_scale` and `global_scale` name pieces."""

    title: str
    kind: Kind
    block: int | None
    pieces: tuple[Piece, ...]
    read: Callable[[Arrays], Quantized]
    offsets: bool = False
    activations: Literal["none", "int8", "fp8"] = "none"
    prescale: str | None = None
    input_scale: str | None = None
    global_scale: str | None = None

    def logical(self, tensors: Collection[str]) -> set[str]:
        """The names that an unquantized checkpoint would have."""
        suffixes = {piece.suffix for piece in self.pieces}
        parts = (name.rpartition(".") for name in tensors)
        return {f"{m}.weight" if s in suffixes else f"{m}.{s}" for m, _, s in parts}


def scalar(n: int, k: int) -> tuple[Shape, ...]:
    return (), (1,)


def per_column(n: int, k: int) -> tuple[Shape, ...]:
    """One number for each of the n outputs."""
    return (n,), (n, 1)


def per_input(n: int, k: int) -> tuple[Shape, ...]:
    return ((k,),)


def whole(n: int, k: int) -> tuple[Shape, ...]:
    return ((n, k),)


def per_block(block: int) -> Callable[[int, int], tuple[Shape, ...]]:
    """[n, k / block]"""

    def shapes(n: int, k: int) -> tuple[Shape, ...]:
        return ((n, k // block),)

    return shapes


def column_scales(scale: NDArray[Any], n: int) -> NDArray[np.float32]:
    """[1, n] of one number for all or one for each."""
    flat = np.asarray(scale, np.float32).reshape(1, -1)
    return np.ascontiguousarray(np.broadcast_to(flat, (1, n)))


def block_scales(scale: NDArray[Any]) -> NDArray[np.float32]:
    """[n, blocks] -> [blocks, n] float32."""
    return np.ascontiguousarray(scale.astype(np.float32).T)
