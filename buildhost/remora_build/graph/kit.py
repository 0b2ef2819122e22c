"""What every part of the decoder builds with: nodes, the dialect's operations, the two descriptions
and the packed projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from remora_build.families.shape import Norm, has_norm_bias
from remora_build.graph import layout
from remora_build.graph.linear import Linear
from remora_build.graph.matrix import MatrixWeights
from remora_build.graph.nodes import Dims, Nodes
from remora_build.graph.ops import Dialect
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import Projection


@dataclass(frozen=True)
class Kit:
    nodes: Nodes
    ops: Dialect
    spec: DecoderSpec
    graph: GraphSpec
    weights: MatrixWeights
    linear: Linear

    @property
    def cache_shape(self) -> Dims:
        return ["b", self.spec.kv_heads, self.graph.context, self.spec.head_dim]

    def layer_norm(self, layer: int, norm: Norm, x: ir.Value) -> ir.Value:
        """One of a layer's norms, with the layer's weight."""
        return self._norm(f"layers.{layer}.{norm}", x, bias=has_norm_bias(self.spec, norm))

    def final_norm(self, x: ir.Value) -> ir.Value:
        return self._norm(layout.FINAL_NORM, x, bias=self.spec.norm_bias)

    def scaled(self, name: str, x: ir.Value, factor: float, output: str | None = None) -> ir.Value:
        """x times a number in the graph's dtype; nothing for 1 (give no `output` then)."""
        if factor == 1.0:
            return x
        number = self.nodes.number(factor, self.graph.dtype)
        return self.nodes.add("Mul", name, [x, number], output=output)

    def parts(self, packed: ir.Value, layer: int, parts: tuple[Projection, ...]) -> list[ir.Value]:
        """Slices of the last axis of [b, s, n] in packed order."""
        nodes, values, begin = self.nodes, [], 0
        for part in parts:
            end = begin + self.spec.out_features(part)
            bounds = [nodes.integers(begin), nodes.integers(end), nodes.integers(2)]
            values.append(nodes.add("Slice", f"layers.{layer}.{part}.slice", [packed, *bounds]))
            begin = end
        return values

    def stream(self, value: ir.Value) -> ir.Value:
        """Marks a value of the residual stream: the graph may be cut there."""
        return self.nodes.annotate(value, self.graph.dtype, ["b", "s", self.spec.hidden])

    def _norm(self, name: str, x: ir.Value, *, bias: bool) -> ir.Value:
        weight, epsilon = self.nodes.weight(f"{name}.weight"), self.spec.norm_eps
        if self.spec.norm == "rms":
            return self.ops.rms_norm(name, x, weight, epsilon)
        added = self.nodes.weight(f"{name}.bias") if bias else None
        return self.ops.layer_norm(name, x, weight, added, epsilon)
