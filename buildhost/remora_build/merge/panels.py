"""The arithmetic of one panel of rows, float32 throughout and rounded once. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.finite import all_finite
from remora_build.checkpoint.safetensors_file import ITEM_BYTES, TensorEntry
from remora_build.checkpoint.stream import numpy_dtype
from remora_build.merge.operands import F32, Operands
from remora_build.merge.reading import Grid
from remora_contract.errors import AdapterInvalid

PANEL_BYTES = 512 << 10  # as stored: with its float32 copy it fits the processor's cache


@dataclass(frozen=True)
class Panel:
    """Rows first … first + count of a tensor; they lie within one block (expert), of which
    `offset` is their first row."""

    first: int
    count: int
    block: int
    offset: int


@dataclass(frozen=True)
class Work:
    """What happens to a tensor's rows, everything loaded. `row_magnitude` [rows], `column_factor`
    [columns] already divided by the norm, `shift` [columns], `rows` row -> trained values."""

    operands: Operands | None = None
    row_magnitude: F32 | None = None
    column_factor: F32 | None = None
    shift: F32 | None = None
    rows: Mapping[int, F32] = field(default_factory=dict)


def panels(entry: TensorEntry, block_rows: int | None = None) -> Iterator[Panel]:
    """All rows in order. `block_rows`: no panel crosses a multiple of it."""
    grid = Grid.of(entry)
    step = max(1, PANEL_BYTES // max(1, grid.columns * ITEM_BYTES[entry.dtype]))
    height = block_rows or max(1, grid.rows)
    for start in range(0, grid.rows, height):
        for first in range(start, start + height, step):
            count = min(step, start + height - first)
            yield Panel(first, count, start // height, first - start)


def summed(panel: Panel, values: NDArray[np.generic], operands: Operands | None) -> F32:
    """W + Σ scale · B A, the rows of the panel."""
    result = values.astype(np.float32)
    if operands is not None:
        result += operands.left[panel.offset : panel.offset + panel.count] @ operands.right
    return result


def merged(panel: Panel, values: NDArray[np.generic], work: Work) -> F32:
    """The panel's new rows [count, columns]. Trained tokens belong to the base: what other adapters
    add to the tensor is added to them too."""
    last = panel.first + panel.count
    base = values.astype(np.float32)
    for row in work.rows.keys() & range(panel.first, last):
        base[row - panel.first] = work.rows[row]
    result = summed(panel, base, work.operands)
    if work.row_magnitude is not None:
        norms = np.sqrt(np.einsum("ij,ij->i", result, result))
        with np.errstate(divide="ignore", invalid="ignore"):
            result *= (work.row_magnitude[panel.first : last] / norms)[:, None]
    if work.column_factor is not None:
        result *= work.column_factor
    if work.shift is not None:
        result += work.shift
    return result


def rounded(values: F32, entry: TensorEntry) -> NDArray[np.generic]:
    """In the tensor's dtype. Raises AdapterInvalid naming a tensor that leaves it."""
    with np.errstate(over="ignore"):
        result = values.astype(numpy_dtype(entry.dtype))
    if not all_finite(result):
        raise AdapterInvalid(
            f"{entry.name} merged is not finite in {entry.dtype}: the adapter does not suit this "
            "checkpoint, or one of them is damaged"
        )
    return result
