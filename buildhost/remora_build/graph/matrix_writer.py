"""One matrix into the data file: cast, or its codes and scales, made here or read from a quantized
checkpoint. Memory: about the matrix as stored; for nvfp4 made here, as the checkpoint has it.

Owns how a form's initializers are filled; where weights come from is handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build import quantize_formats
from remora_build.families.naming import Source
from remora_build.graph import forms
from remora_build.graph.data_file import DataFile
from remora_build.graph.forms import CODES, Forms, MatrixForm
from remora_build.graph.layout import Slots
from remora_build.quantize import pack_nibbles, quantize
from remora_build.quantized.matrix import Quantized, rounded_scales
from remora_build.quantized.plan import Vectors
from remora_contract.errors import CheckpointInvalid, InternalFault

_PACKED_ROWS = 64  # even, so that a panel ends at a whole byte

Rows = NDArray[np.generic]
Columns = Callable[[Sequence[Source]], Iterator[tuple[int, Rows]]]
Chunks = Iterator[tuple[int, Quantized]]  # (first column, some columns of the matrix)


class MatrixWriter:
    """`columns` yields (first column, rows [m, k]) of float sources, packed side by side."""

    def __init__(
        self,
        slots: Slots,
        own: Forms,
        dtype: np.dtype[Any],
        out: DataFile,
        pool: Executor,
        columns: Columns,
    ) -> None:
        self._slots = slots
        self._forms = own
        self._dtype = dtype
        self._out = out
        self._pool = pool
        self._columns = columns

    def write(self, weight: str, sources: Sequence[Source]) -> None:
        """From float sources [n, k], quantized here when the form asks for it."""
        form = self._forms.of(weight)
        if form.kind == "plain":
            self.plain(weight, sources)
        else:
            self.write_codes(weight, self._made(form, sources), Vectors())

    def write_codes(self, weight: str, chunks: Chunks, vectors: Vectors) -> None:
        """From codes; all columns of the matrix must be among the chunks."""
        form = self._forms.of(weight)
        self._before(weight, form, vectors)
        self._codes(weight, form, chunks)
        self._after(weight, form, vectors)

    def write_plain(self, weight: str, sources: Sequence[Source], vectors: Vectors) -> None:
        """From float sources of a checkpoint whose other matrices are quantized."""
        self.plain(weight, sources)
        self._after(weight, self._forms.of(weight), vectors)

    def plain(self, weight: str, sources: Sequence[Source]) -> None:
        """Float sources cast to the graph's dtype, whatever the weight's form."""
        slot = self._slots[weight]
        packed = np.empty(slot.shape, self._dtype)
        for column, rows in self._columns(sources):
            packed[:, column : column + len(rows)] = rows.astype(self._dtype).T
        self._out.put(slot, packed)

    def _made(self, form: MatrixForm, sources: Sequence[Source]) -> Chunks:
        if form.kind == "nvfp4":
            yield from self._made_nvfp4(sources)
            return
        for column, rows in self._columns(sources):
            turned = np.ascontiguousarray(rows.T)
            if form.kind == "int4" and form.block is not None:
                made = quantize(turned, form.block, self._pool)
                yield column, Quantized("int4", made.codes, made.scales)
            elif form.kind == "int8":
                yield column, quantize_formats.int8(turned)
            elif form.kind == "mxfp8":
                yield column, quantize_formats.mxfp8(turned)
            else:
                raise InternalFault(f"nobody makes {form.kind}")

    def _made_nvfp4(self, sources: Sequence[Source]) -> Chunks:
        """The global scale rests on all weights, so they are held."""
        held = [(column, rows.copy()) for column, rows in self._columns(sources)]
        largest = max(float(np.abs(rows.astype(np.float32)).max()) for _, rows in held)
        whole = quantize_formats.nvfp4_global(largest)
        for column, rows in held:
            yield column, quantize_formats.nvfp4(np.ascontiguousarray(rows.T), whole)

    def _before(self, weight: str, form: MatrixForm, vectors: Vectors) -> None:
        if form.prescaled:
            self._put(forms.prescale(weight), vectors.prescale)
        if form.activations != "none":
            self._put(forms.input_scale(weight), vectors.input_scale)

    def _after(self, weight: str, form: MatrixForm, vectors: Vectors) -> None:
        if form.branch_in:
            self._put(forms.branch_in(weight), vectors.branch_in)
        if form.branch_out:
            self._put(forms.branch_out(weight), vectors.branch_out)

    def _put(self, name: str, values: NDArray[np.float32] | float | None) -> None:
        """A vector that multiplies something. Raises CheckpointInvalid when the graph's dtype makes
        zero or infinity of it."""
        if values is None:
            raise InternalFault(f"{name} has no values")
        with np.errstate(over="ignore"):
            stored = np.asarray(values).astype(self._dtype)
        if not bool((np.isfinite(stored) & ((stored != 0) == (np.asarray(values) != 0))).all()):
            raise CheckpointInvalid(
                f"{name} has values that {self._dtype} cannot hold; export with --dtype float32"
            )
        self._out.put(self._slots[name], stored)

    def _codes(self, weight: str, form: MatrixForm, chunks: Chunks) -> None:
        code_slot = self._slots[forms.codes(weight)]
        k, n = code_slot.shape
        count = forms.blocks(form, k)
        nvfp4 = form.kind == "nvfp4"
        codes = np.empty((k, n), np.int8 if form.kind in ("int4", "int8") else np.uint8)
        scales = np.empty((count, n), np.uint8 if nvfp4 else self._dtype)
        whole = np.empty(n, np.float32)
        offsets = np.zeros((count, n), np.float32)
        for column, chunk in chunks:
            part = rounded_scales(chunk, self._dtype)
            here = slice(column, column + part.codes.shape[1])
            codes[:, here], scales[:, here] = part.codes, part.scales
            whole[here] = part.global_scale
            if part.offsets is not None:
                offsets[:, here] = part.offsets * part.scales.astype(np.float32)
        self._put_codes(weight, form, codes)
        slot = self._slots[forms.scales(weight)]
        self._out.put(slot, scales.reshape(slot.shape))
        if nvfp4:
            slot = self._slots[forms.global_scale(weight)]
            self._out.put(slot, whole if form.global_columns else whole[:1].reshape(()))
        if form.offsets:
            self._put(forms.offsets(weight), offsets)

    def _put_codes(self, weight: str, form: MatrixForm, codes: NDArray[Any]) -> None:
        slot = self._slots[forms.codes(weight)]
        if forms.BITS[CODES[form.kind]] == 8:
            self._out.put(slot, codes)
            return
        self._out.begin(slot)
        for first in range(0, len(codes), _PACKED_ROWS):
            self._out.append(pack_nibbles(codes[first : first + _PACKED_ROWS].view(np.int8)))
