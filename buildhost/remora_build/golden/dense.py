"""Weights that ONNX Runtime cannot dequantize (e2m1), put into a cut model as the numbers they
stand for: the same products, and a layer's weights in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from remora_build.golden.slots import SlotReader
from remora_build.graph import forms
from remora_build.graph.layout import Slot
from remora_build.quantized.matrix import Quantized, dequantize


def make_dense(model: onnx.ModelProto, data: Path, slots: Mapping[str, Slot]) -> None:
    """Replaces every DequantizeLinear of e2m1 codes, with the Cast after it, by its value."""
    graph = model.graph
    codes = {i.name for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT4E2M1}
    if not codes:
        return
    users = {name: node for node in graph.node for name in node.input}
    producers = {name: node for node in graph.node for name in node.output}
    gone: list[onnx.NodeProto] = []
    with data.open("rb") as file:
        reader = SlotReader(file.fileno(), slots)
        for name in sorted(codes):
            node, value = users[name], _value(reader, slots, name.removesuffix(".q"))
            gone += [node, producers[node.input[1]]]
            cast = users.get(node.output[0])
            if cast is not None and cast.op_type == "Cast":
                gone.append(cast)
                dtype = onnx.helper.tensor_dtype_to_np_dtype(cast.attribute[0].i)
                node, value = cast, value.astype(dtype)
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    for node in gone:
        graph.node.remove(node)
    read = {name for node in graph.node for name in node.input}
    for tensor in [i for i in graph.initializer if i.name not in read]:
        graph.initializer.remove(tensor)


def _value(reader: SlotReader, slots: Mapping[str, Slot], weight: str) -> NDArray[Any]:
    """[k, n] float32"""
    n = slots[forms.codes(weight)].shape[1]
    codes = reader.code_columns(forms.codes(weight), 0, n).view(np.uint8) & 0xF
    scales = reader.columns(forms.scales(weight), 0, n)
    whole = reader.whole(forms.global_scale(weight)).astype(np.float32).reshape(-1)
    return dequantize(Quantized("nvfp4", codes, scales)) * whole
