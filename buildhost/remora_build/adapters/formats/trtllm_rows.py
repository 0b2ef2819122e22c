"""The algebra of TensorRT-LLM's LoRA rows: a projection's factors to a row and back, cut for tensor
parallelism and joined again. Pure; knows no files.

    Remora:        y += (x a) b              a [k, r]    b [r, n], scaling in b
    TensorRT-LLM:  y += (x inᵀ) outᵀ         in [r, k] = aᵀ    out [n, r] = bᵀ
    with DoRA:     y = m ⊙ (x Wᵀ + (x inᵀ) outᵀ) + bias        m [n]

m is PEFT's magnitude already divided by ‖W + out in‖ along k, row by row: the engine does
not divide. A flat row is in, out and m, one after the other, then zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.formats.registry import GateUpOrder
from remora_build.adapters.formats.trtllm_modules import (
    MODULE_OF,
    Module,
    Shape,
    check_cut,
    parts_of,
)
from remora_build.adapters.sidecar import Factor
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import AdapterTarget

Values = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Row:
    """One module of one layer: in_ [r, k], out [n, r], magnitude [n] or None without DoRA."""

    module: Module
    layer: int
    in_: Values
    out: Values
    magnitude: Values | None = None

    @property
    def rank(self) -> int:
        return int(self.in_.shape[0])

    @property
    def name(self) -> str:
        return f"{self.module.name} of layer {self.layer}"

    @property
    def values(self) -> int:
        """How many numbers it stores."""
        return self.in_.size + self.out.size + (0 if self.magnitude is None else self.out.shape[0])

    def flat(self) -> Values:
        """[values]"""
        magnitude = () if self.magnitude is None else (self.magnitude,)
        return np.concatenate([np.ravel(x) for x in (self.in_, self.out, *magnitude)])


def row_values(rank: int, shape: Shape, dora: bool) -> int:
    """How many numbers of a stored row belong to it."""
    return rank * (shape.k + shape.n) + (shape.n if dora else 0)


def row_from(
    values: Values, module: Module, layer: int, rank: int, shape: Shape, *, dora: bool
) -> Row:
    """Inverse of `Row.flat`; `values` [row_values]."""
    in_, out, magnitude = np.split(values, [rank * shape.k, rank * (shape.k + shape.n)])
    return Row(
        module,
        layer,
        in_.reshape(rank, shape.k),
        out.reshape(shape.n, rank),
        magnitude if dora else None,
    )


def rows_of(factors: Mapping[AdapterTarget, Factor]) -> list[Row]:
    """One row for each target, by layer and module number, in float32."""
    rows = [
        Row(MODULE_OF[t.projection], t.layer, f.a.T, f.b.T, f.scale) for t, f in factors.items()
    ]
    return sorted(rows, key=lambda row: (row.layer, row.module.id))


def factors_of(
    row: Row, shape: Shape, scaling: float, gate_up: GateUpOrder | None
) -> dict[AdapterTarget, Factor]:
    """The projections of a row, in float32; the parts of a fused module share `in`."""
    a = np.ascontiguousarray(row.in_.T, np.float32)
    edges = np.cumsum(shape.parts)[:-1]
    outs = np.split(row.out, edges)
    scales = [None] * len(outs) if row.magnitude is None else np.split(row.magnitude, edges)
    return {
        AdapterTarget(row.layer, p): Factor(
            a, np.ascontiguousarray(out.T, np.float32), scaling, scale
        )
        for p, out, scale in zip(parts_of(row.module, gate_up), outs, scales, strict=True)
    }


def split(row: Row, shape: Shape, tp_size: int) -> list[Row]:
    """What each rank keeps. Raises AdapterInvalid when it cannot be shared evenly."""
    check_cut(row.module, shape, tp_size)
    if row.module.cut == "none":
        return [row] * tp_size
    if row.module.cut == "row":
        pieces = np.split(row.in_, tp_size, axis=1)
        return [Row(row.module, row.layer, p, row.out, row.magnitude) for p in pieces]
    outs = _cut_parts(row.out, shape.parts, tp_size)
    whole = row.magnitude
    magnitudes = [None] * tp_size if whole is None else _cut_parts(whole, shape.parts, tp_size)
    return [
        Row(row.module, row.layer, row.in_, o, m) for o, m in zip(outs, magnitudes, strict=True)
    ]


def join(rows: Sequence[Row], shape: Shape) -> Row:
    """Inverse of `split`; `shape` is the whole module's. Raises AdapterInvalid when the ranks
    differ in what each of them keeps whole."""
    first = rows[0]
    if first.module.cut == "row":
        in_ = np.concatenate([row.in_ for row in rows], axis=1)
        magnitude = first.magnitude
        _check_same(rows, "out", [row.out for row in rows])
        _check_same(rows, "the magnitude", [row.magnitude for row in rows])
        return Row(first.module, first.layer, in_, first.out, magnitude)
    _check_same(rows, "in", [row.in_ for row in rows])
    if first.module.cut == "none":
        _check_same(rows, "out", [row.out for row in rows])
        _check_same(rows, "the magnitude", [row.magnitude for row in rows])
        return first
    out = _join_parts([row.out for row in rows], shape.parts)
    magnitudes = [row.magnitude for row in rows if row.magnitude is not None]
    whole = _join_parts(magnitudes, shape.parts) if magnitudes else None
    return Row(first.module, first.layer, first.in_, out, whole)


def _cut_parts(values: Values, parts: tuple[int, ...], tp_size: int) -> list[Values]:
    """For each rank its share of every part, along the first axis."""
    pieces = [np.split(part, tp_size) for part in np.split(values, np.cumsum(parts)[:-1])]
    return [np.concatenate(shares) for shares in zip(*pieces, strict=True)]


def _join_parts(shares: Sequence[Values], parts: tuple[int, ...]) -> Values:
    """Inverse of `_cut_parts`."""
    edges = np.cumsum(parts)[:-1] // len(shares)
    pieces = [np.split(share, edges) for share in shares]
    return np.concatenate([piece for part in zip(*pieces, strict=True) for piece in part])


def _check_same(rows: Sequence[Row], what: str, values: Sequence[Values | None]) -> None:
    first = values[0]
    for i, other in enumerate(values[1:], 1):
        if not _equal(first, other):
            raise AdapterInvalid(
                f"{rows[0].name}: {what} must be the same on every rank and rank {i} differs from "
                "rank 0: the files belong to different adapters"
            )


def _equal(a: Values | None, b: Values | None) -> bool:
    return a is b if a is None or b is None else np.array_equal(a, b)
