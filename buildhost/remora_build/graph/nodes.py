"""A thin hand on onnx_ir: add a node, refer to a weight of the data file, share small constants.

Owns how values are made and named; knows no decoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from remora_build.graph.forms import StoredDtype
from remora_build.graph.layout import Slot
from remora_build.version import exporter_name

Dims = Sequence[int | str]  # a text is a symbolic dimension
ElementDtype = StoredDtype | Literal["bool"]
_IR_VERSION = {20: 9, 21: 10, 24: 11}  # the file format that an operator set came with
IR_DTYPE: dict[StoredDtype, ir.DataType] = {
    "float16": ir.DataType.FLOAT16,
    "float32": ir.DataType.FLOAT,
    "int4": ir.DataType.INT4,
    "int8": ir.DataType.INT8,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "float8e4m3": ir.DataType.FLOAT8E4M3FN,
    "float4e2m1": ir.DataType.FLOAT4E2M1,
}
_NUMBERS: dict[StoredDtype, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "int8": np.dtype(np.int8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "float8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
}


class Nodes:
    """Nodes, inputs, outputs and initializers of one graph in the order they are asked for."""

    def __init__(self, slots: Mapping[str, Slot], data_file: str, opset: int) -> None:
        self._slots = slots
        self._opset = opset
        self._data_file = data_file
        self._initializers: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def input(self, name: str, dtype: ElementDtype, shape: Dims) -> ir.Value:
        value = _typed(ir.Value(name=name), dtype, shape)
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, dtype: ElementDtype, shape: Dims) -> None:
        self._outputs.append(_typed(value, dtype, shape))

    def add(
        self,
        op: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        output: str | None = None,
    ) -> ir.Value:
        """A node of the default domain with one output, which is called `name` unless given."""
        node = ir.node(op, inputs, attributes or {}, name=name)
        node.outputs[0].name = output or name
        self._nodes.append(node)
        return node.outputs[0]

    def add_pair(
        self,
        op: str,
        name: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> tuple[ir.Value, ir.Value]:
        """A node with two outputs, called `name` and `name`.second."""
        node = ir.node(op, inputs, attributes or {}, name=name, num_outputs=2)
        node.outputs[0].name, node.outputs[1].name = name, f"{name}.second"
        self._nodes.append(node)
        return node.outputs[0], node.outputs[1]

    def body(self) -> Nodes:
        """Nodes of a subgraph. It may read every value of this graph, and its weights and constants
        are this graph's."""
        inner = Nodes(self._slots, self._data_file, self._opset)
        inner._initializers = self._initializers
        return inner

    def subgraph(self, name: str) -> ir.Graph:
        """What `body` made, as the attribute of a node."""
        return ir.Graph(self._inputs, self._outputs, nodes=self._nodes, name=name)

    def annotate(self, value: ir.Value, dtype: StoredDtype, shape: Dims) -> ir.Value:
        """Records type and shape: a value at which the graph may be cut."""
        return _typed(value, dtype, shape)

    def weight(self, name: str) -> ir.Value:
        """An initializer of the data file. Raises KeyError when the layout lacks it."""
        if name not in self._initializers:
            slot = self._slots[name]
            tensor = ir.ExternalTensor(
                self._data_file,
                slot.offset,
                slot.bytes,
                IR_DTYPE[slot.dtype],
                shape=ir.Shape(slot.shape),
                name=name,
            )
            self._initializers[name] = _initializer(name, tensor)
        return self._initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """A shared int64 vector inside the model file."""
        name = "const." + "_".join(map(str, values))
        return self._constant(name, np.array(values, np.int64))

    def column(self, values: Sequence[float]) -> ir.Value:
        """A shared float32 tensor [values, 1, 1] inside the model file."""
        name = "const.float32.column." + "_".join(map(str, values))
        return self._constant(name, np.array(values, np.float32).reshape(-1, 1, 1))

    def number(self, value: float, dtype: StoredDtype) -> ir.Value:
        """A shared scalar inside the model file."""
        name = f"const.{dtype}." + re.sub("[^0-9a-z.]", "minus_", str(value))
        return self._constant(name, np.array(value, _NUMBERS[dtype]))

    def true(self) -> ir.Value:
        """A shared scalar of truth inside the model file."""
        return self._constant("const.true", np.array(True))

    def ones(self, count: int, dtype: StoredDtype) -> ir.Value:
        """A shared vector of ones inside the model file."""
        return self._constant(f"const.{dtype}.ones_{count}", np.ones(count, dtype))

    def _constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        if name not in self._initializers:
            self._initializers[name] = _initializer(name, ir.Tensor(array, name=name))
        return self._initializers[name]

    def model(self, name: str) -> ir.Model:
        unused = set(self._slots) - set(self._initializers)
        if unused:
            raise KeyError(f"laid out but not in the graph: {sorted(unused)}")
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self._opset},
            name=name,
        )
        producer, _, version = exporter_name().partition(" ")
        return ir.Model(
            graph,
            ir_version=_IR_VERSION[self._opset],
            producer_name=producer,
            producer_version=version,
        )


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


def _typed(value: ir.Value, dtype: ElementDtype, shape: Dims) -> ir.Value:
    value.type = ir.TensorType(ir.DataType.BOOL if dtype == "bool" else IR_DTYPE[dtype])
    value.shape = ir.Shape(shape)
    return value
