"""The forms in which the graph holds a matrix [k, n], and the initializers each is made of. Pure.

    form     W[i, j]                                          initializers of weight NAME
    plain    W                                                NAME
    int4     q[i, j] * scale[i / block, j]                    NAME.q  NAME.scale
    int8     q[i, j] * scale[j]  (or as int4)                 NAME.q  NAME.scale
    fp8      e4m3(q[i, j]) * scale[j]  (or as mxfp8)          NAME.q  NAME.scale
    mxfp8    e4m3(q[i, j]) * scale[i / 32, j]                 NAME.q  NAME.scale
    nvfp4    e2m1(q[i, j]) * e4m3(scale[i / 16, j]) * global  NAME.q  NAME.scale  NAME.global

What a projection computes is x' W [+ sums(x) offset] with x' = round(x * prescale):

    offset       [k / block, n]  (8 - zero) * scale of an asymmetric int4; sums: of x over a block
    prescale     [k]             AWQ and SmoothQuant
    input_scale  []              x' is rounded to int8 or e4m3 multiples of it
    branch_in    [k]             the adapter branch reads x * branch_in (a norm has a scale in it)
    branch_out   [n]             and its answer is multiplied by branch_out
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from remora_contract.bundle import QuantSpec

StoredDtype = Literal[
    "float16", "float32", "int4", "int8", "int32", "int64", "float8e4m3", "float4e2m1"
]  # fmt: skip
BITS: dict[StoredDtype, int] = {
    "float16": 16,
    "float32": 32,
    "int4": 4,
    "int8": 8,
    "int32": 32,
    "int64": 64,
    "float8e4m3": 8,
    "float4e2m1": 4,
}
# In memory; what numpy lacks is held as bits, and two 4-bit codes in a byte.
NUMPY: dict[StoredDtype, np.dtype[np.generic]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "float8e4m3": np.dtype(np.uint8),
}
Kind = Literal["plain", "int4", "int8", "fp8", "mxfp8", "nvfp4"]
CODES: dict[Kind, StoredDtype] = {
    "int4": "int4",
    "int8": "int8",
    "fp8": "float8e4m3",
    "mxfp8": "float8e4m3",
    "nvfp4": "float4e2m1",
}
Initializer = tuple[str, StoredDtype, tuple[int, ...]]


@dataclass(frozen=True)
class MatrixForm:
    """Of one matrix. `block` None: one scale for a whole column."""

    kind: Kind = "plain"
    block: int | None = None
    offsets: bool = False
    global_columns: bool = False  # nvfp4: global is [n], for parts that differ in it; else []
    prescaled: bool = False
    activations: Literal["none", "int8", "fp8"] = "none"
    branch_in: bool = False
    branch_out: bool = False


PLAIN = MatrixForm()


@dataclass(frozen=True)
class Forms:
    """Which form each matrix has ("head", "layers.3.qkv"): `own`, or what the QuantSpec says."""

    quant: QuantSpec = field(default_factory=QuantSpec)
    own: Mapping[str, MatrixForm] = field(default_factory=dict)

    def of(self, weight: str) -> MatrixForm:
        """`weight` is the initializer's name: the matrix's, then ".weight"."""
        matrix = weight.removesuffix(".weight")
        if matrix in self.own:
            return self.own[matrix]
        kind = self.quant.kind
        if kind == "none" or not self.quant.quantizes(matrix):
            return PLAIN
        return MatrixForm(kind, self.quant.block)


def codes(weight: str) -> str:
    return f"{weight}.q"


def scales(weight: str) -> str:
    return f"{weight}.scale"


def global_scale(weight: str) -> str:
    return f"{weight}.global"


def offsets(weight: str) -> str:
    return f"{weight}.offset"


def prescale(weight: str) -> str:
    return f"{weight}.prescale"


def input_scale(weight: str) -> str:
    return f"{weight}.input_scale"


def branch_in(weight: str) -> str:
    return f"{weight}.branch_in"


def branch_out(weight: str) -> str:
    return f"{weight}.branch_out"


def blocks(form: MatrixForm, k: int) -> int:
    """How many scales a column has."""
    return 1 if form.block is None else k // form.block


def initializers(
    weight: str, k: int, n: int, form: MatrixForm, dtype: Literal["float16", "float32"]
) -> Iterator[Initializer]:
    """Everything that `weight` is made of, in file order."""
    if form.prescaled:
        yield prescale(weight), dtype, (k,)
    if form.activations != "none":
        yield input_scale(weight), dtype, ()
    if form.kind == "plain":
        yield weight, dtype, (k, n)
    else:
        yield codes(weight), CODES[form.kind], (k, n)
        shape = (n,) if form.block is None else (k // form.block, n)
        yield scales(weight), "float8e4m3" if form.kind == "nvfp4" else dtype, shape
    if form.kind == "nvfp4":
        yield global_scale(weight), "float32", (n,) if form.global_columns else ()
    if form.offsets:
        yield offsets(weight), dtype, (blocks(form, k), n)
    if form.branch_in:
        yield branch_in(weight), dtype, (k,)
    if form.branch_out:
        yield branch_out(weight), dtype, (n,)
