"""A head that is stored as codes, computed outside the graph: its input and its columns as the
graph makes them (docs/graph.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.golden.slots import SlotReader
from remora_build.graph import forms
from remora_build.graph.layout import HEAD, Slot
from remora_build.quantized.matrix import E4M3, E4M3_MAX, Quantized, dequantize
from remora_contract.bundle import GraphSpec
from remora_contract.errors import InternalFault

_FOUR_BITS = ("int4", "float4e2m1")


def prepared(
    x: NDArray[np.float32], data: Path, slots: Mapping[str, Slot], graph: GraphSpec
) -> NDArray[np.float32]:
    """`x` [rows, hidden] as the product reads it: smoothed and rounded where the head asks."""
    scale, rounding = forms.prescale(HEAD), forms.input_scale(HEAD)
    with data.open("rb") as file:
        reader = SlotReader(file.fileno(), slots)
        if scale in slots:
            x = x * reader.whole(scale).astype(np.float32)
        if rounding not in slots:
            return x
        step = np.float32(reader.whole(rounding))
    if graph.quant.activations == "int8":
        return np.asarray(np.clip(np.rint(x / step), -128, 127) * step)
    codes = np.clip(x / step, -E4M3_MAX, E4M3_MAX).astype(E4M3)
    return np.asarray(codes.astype(np.float32) * step)


def head_columns(
    reader: SlotReader, slots: Mapping[str, Slot], graph: GraphSpec, begin: int, end: int
) -> NDArray[np.float32]:
    """W[:, begin:end] [hidden, end - begin]."""
    name, kind = forms.codes(HEAD), graph.quant.kind
    if kind == "none":
        raise InternalFault("a head of codes in a graph that has none")
    codes: NDArray[Any]
    if slots[name].dtype in _FOUR_BITS:
        codes = reader.code_columns(name, begin, end)
    else:
        codes = reader.columns(name, begin, end)
    scales = reader.columns(forms.scales(HEAD), begin, end)
    if kind == "nvfp4":
        codes = codes.view(np.uint8) & 0xF
        whole = float(reader.whole(forms.global_scale(HEAD)))
        return dequantize(Quantized(kind, codes, scales, whole))
    weight = dequantize(Quantized(kind, codes, scales.astype(np.float32)))
    if forms.offsets(HEAD) not in slots:
        return weight
    offsets = reader.columns(forms.offsets(HEAD), begin, end).astype(np.float32)
    return weight + np.repeat(offsets, len(weight) // len(offsets), axis=0)
