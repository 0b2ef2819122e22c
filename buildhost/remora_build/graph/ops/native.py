"""The native dialect: opset 24, one fused operator for each operation, as TensorRT >= 10.15 and
ONNX Runtime >= 1.23 have them.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.nodes import Nodes
from remora_build.graph.ops.dialect import Rotation
from remora_contract.bundle import GraphSpec

OPSET = 24


class NativeDialect:
    """A `Dialect`."""

    def __init__(self, nodes: Nodes, graph: GraphSpec) -> None:
        self._nodes = nodes
        self._graph = graph

    def mask(self, position_ids: ir.Value, window: int | None = None) -> ir.Value:
        nodes, name = self._nodes, "mask" if window is None else f"mask.window_{window}"
        query = nodes.add(
            "Unsqueeze", f"{name}.query_positions", [position_ids, nodes.integers(1, 3)]
        )
        cached = nodes.weight(layout.CACHE_POSITIONS)
        visible = nodes.add("LessOrEqual", f"{name}.visible", [cached, query])
        if window is not None:
            edge = nodes.add("Sub", f"{name}.edge", [query, nodes.integers(window)])
            inside = nodes.add("Greater", f"{name}.inside", [cached, edge])
            visible = nodes.add("And", f"{name}.visible_inside", [visible, inside])
        zero, hidden = (nodes.number(x, self._graph.dtype) for x in (0.0, float("-inf")))
        return nodes.add("Where", name, [visible, zero, hidden])

    def cache_index(self, position_ids: ir.Value) -> ir.Value:
        """[b]: where this step's keys and values go."""
        nodes = self._nodes
        zero, one = nodes.integers(0), nodes.integers(1)
        first = nodes.add("Slice", "cache.first_position", [position_ids, zero, one, one])
        return nodes.add("Squeeze", "cache.write_index", [first, one])

    def write_cache(
        self, name: str, past: ir.Value, new: ir.Value, index: ir.Value, *, output: str
    ) -> ir.Value:
        attributes = {"axis": -2, "mode": "linear"}
        return self._nodes.add("TensorScatter", name, [past, new, index], attributes, output=output)

    def rms_norm(self, name: str, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        return self._norm("RMSNormalization", name, x, weight, None, epsilon)

    def layer_norm(
        self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float
    ) -> ir.Value:
        return self._norm("LayerNormalization", name, x, weight, bias, epsilon)

    def _norm(
        self,
        op: str,
        name: str,
        x: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        epsilon: float,
    ) -> ir.Value:
        """The operators take a weight of the normalised axis only; one a head is multiplied."""
        nodes, attributes = self._nodes, {"axis": -1, "epsilon": epsilon}
        biases = [] if bias is None else [bias]
        if weight.shape is None or len(weight.shape) == 1:
            return nodes.add(op, name, [x, weight, *biases], attributes)
        ones = nodes.ones(weight.shape.numpy()[-1], self._graph.dtype)
        plain = nodes.add(op, f"{name}.plain", [x, ones], attributes)
        scaled = nodes.add("Mul", name, [plain, weight])
        return nodes.add("Add", f"{name}.bias", [scaled, *biases]) if biases else scaled

    def rotate(self, name: str, x: ir.Value, rotation: Rotation) -> ir.Value:
        attributes: dict[str, Any] = {}
        if rotation.interleaved:
            attributes["interleaved"] = 1
        if rotation.dims is not None:
            attributes["rotary_embedding_dim"] = rotation.dims
        inputs = [x, rotation.cos, rotation.sin, rotation.positions]
        return self._nodes.add("RotaryEmbedding", name, inputs, attributes)

    def attend(
        self,
        name: str,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        mask: ir.Value,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> ir.Value:
        attributes = {"scale": scale} if softcap is None else {"scale": scale, "softcap": softcap}
        return self._nodes.add("Attention", name, [q, k, v, mask], attributes)

    def gelu(self, name: str, x: ir.Value, *, tanh: bool) -> ir.Value:
        return self._nodes.add("Gelu", name, [x], {"approximate": "tanh" if tanh else "none"})
