"""Operations that both dialects spell alike, and attention in plain operators.

Softmax and what leads to it are float32 in every graph; products are in the graph's dtype.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.nodes import Nodes
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec


class CommonOps:
    """The part of a `Dialect` that is not a dialect's own."""

    def __init__(self, nodes: Nodes, spec: DecoderSpec, graph: GraphSpec) -> None:
        self._nodes = nodes
        self._spec = spec
        self._graph = graph
        self._float_masks: dict[ir.Value, ir.Value] = {}

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

    def layer_norm(
        self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float
    ) -> ir.Value:
        return self._fused_norm("LayerNormalization", name, x, weight, bias, epsilon)

    def gelu(self, name: str, x: ir.Value, *, tanh: bool) -> ir.Value:
        return self._nodes.add("Gelu", name, [x], {"approximate": "tanh" if tanh else "none"})

    def _fused_norm(
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

    def _attend_in_parts(
        self,
        name: str,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        mask: ir.Value,
        scale: float,
        softcap: float | None,
    ) -> ir.Value:
        """`Dialect.attend` of plain operators. The queries of a key/value head are further rows of
        it, so keys and values are never repeated; they are scaled first, so that scores keep clear
        of float16's end."""
        nodes, spec = self._nodes, self._spec
        factor = nodes.number(scale, self._graph.dtype)
        scaled = nodes.add("Mul", f"{name}.scaled", [q, factor])
        keys = nodes.add("Transpose", f"{name}.keys", [k], {"perm": [0, 1, 3, 2]})
        grouped = self._with_heads(f"{name}.grouped", scaled, spec.kv_heads)
        scores = nodes.add("MatMul", f"{name}.scores", [grouped, keys])
        scores = self._with_heads(f"{name}.by_head", scores, spec.heads)
        scores = self._to_float(f"{name}.float", scores)
        if softcap is not None:
            scores = self._capped(name, scores, softcap)
        masked = nodes.add("Add", f"{name}.masked", [scores, self._float_mask(mask)])
        weights = nodes.add("Softmax", f"{name}.softmax", [masked], {"axis": -1})
        weights = self._from_float(f"{name}.weights", weights)
        weights = self._with_heads(f"{name}.weights_grouped", weights, spec.kv_heads)
        mixed = nodes.add("MatMul", f"{name}.mixed", [weights, v])
        return self._with_heads(name, mixed, spec.heads)

    def _capped(self, name: str, scores: ir.Value, softcap: float) -> ir.Value:
        nodes, cap = self._nodes, self._nodes.number(softcap, "float32")
        ratio = nodes.add("Div", f"{name}.cap_ratio", [scores, cap])
        bounded = nodes.add("Tanh", f"{name}.cap_tanh", [ratio])
        return nodes.add("Mul", f"{name}.capped", [bounded, cap])

    def _with_heads(self, name: str, x: ir.Value, heads: int) -> ir.Value:
        """[b, heads, s, width] as [b, kv_heads, heads / kv_heads * s, width], or the other way."""
        if self._spec.heads == self._spec.kv_heads:
            return x
        return self._nodes.add("Reshape", name, [x, self._nodes.integers(0, heads, -1, 0)])

    def _float_mask(self, mask: ir.Value) -> ir.Value:
        """The mask in float32, made once for all layers."""
        if mask not in self._float_masks:
            self._float_masks[mask] = self._to_float(f"{mask.name}.float", mask)
        return self._float_masks[mask]

    def _to_float(self, name: str, x: ir.Value) -> ir.Value:
        if self._graph.dtype == "float32":
            return x
        return self._nodes.add("Cast", name, [x], {"to": ir.DataType.FLOAT})

    def _from_float(self, name: str, x: ir.Value) -> ir.Value:
        if self._graph.dtype == "float32":
            return x
        return self._nodes.add("Cast", name, [x], {"to": ir.DataType.FLOAT16})
