"""One packed projection: weight (quantized or not), bias, adapter branch.

    y = x W [+ bias] + ((x A) * gate) B        A [k, T]   B [T, n]   gate [b, 1, T]

Owns which inputs an adapter takes; knows nothing of attention or the MLP.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.families.shape import has_bias
from remora_build.graph import layout
from remora_build.graph.nodes import Dims, Nodes
from remora_contract import targets
from remora_contract.bundle import DecoderSpec, GraphSpec
from remora_contract.targets import GROUPS, PARTS, Group


class GateInputs:
    """The gate of each group, shared by all layers; none in a graph without a bank."""

    def __init__(self, nodes: Nodes, graph: GraphSpec) -> None:
        self._gates: dict[Group, ir.Value] = {}
        if graph.max_bank_rank:
            for group in GROUPS:
                shape: Dims = ["b", 1, columns(group)]
                self._gates[group] = nodes.input(targets.lora_gate(group), graph.dtype, shape)

    def get(self, group: Group) -> ir.Value | None:
        return self._gates.get(group)


def columns(group: Group) -> str:
    """The group's symbolic dimension T, the same in every layer."""
    return f"t_{group}"


class MatrixWeights:
    """A matrix [k, n] to multiply with, dequantized in the graph where it is stored as int4."""

    def __init__(self, nodes: Nodes, graph: GraphSpec) -> None:
        self._nodes = nodes
        self._block = graph.quant.block

    def value(self, name: str, node_name: str) -> ir.Value:
        if self._block is None:
            return self._nodes.weight(name)
        packed = [self._nodes.weight(layout.codes(name)), self._nodes.weight(layout.scales(name))]
        attributes = {"axis": 0, "block_size": self._block}
        return self._nodes.add("DequantizeLinear", node_name, packed, attributes)


class Linear:
    """Calls are the packed projections: `linear(layer, group, x [b, s, k]) -> [b, s, n]`."""

    def __init__(
        self,
        nodes: Nodes,
        spec: DecoderSpec,
        graph: GraphSpec,
        weights: MatrixWeights,
        gates: GateInputs,
    ) -> None:
        self._nodes = nodes
        self._spec = spec
        self._graph = graph
        self._weights = weights
        self._gates = gates

    def __call__(self, layer: int, group: Group, x: ir.Value) -> ir.Value:
        nodes, at = self._nodes, f"layers.{layer}.{group}"
        weight = self._weights.value(layout.group_weight(layer, group), f"{at}.dequantize")
        y = nodes.add("MatMul", f"{at}.matmul", [x, weight])
        if has_bias(self._spec, PARTS[group][0]):
            y = nodes.add("Add", f"{at}.bias_add", [y, nodes.weight(f"{at}.bias")])
        gate = self._gates.get(group)
        return y if gate is None else self._adapted(layer, group, x, y, gate)

    def _adapted(
        self, layer: int, group: Group, x: ir.Value, y: ir.Value, gate: ir.Value
    ) -> ir.Value:
        nodes, t = self._nodes, columns(group)
        k, n = layout.group_in(self._spec, group), layout.group_out(self._spec, group)
        a = nodes.input(targets.lora_a(layer, group), self._graph.dtype, [k, t])
        b = nodes.input(targets.lora_b(layer, group), self._graph.dtype, [t, n])
        at = f"layers.{layer}"
        down = nodes.add("MatMul", f"{at}.lora_a.{group}", [x, a])
        gated = nodes.add("Mul", f"{at}.lora_gate.{group}", [down, gate])
        up = nodes.add("MatMul", f"{at}.lora_b.{group}", [gated, b])
        return nodes.add("Add", f"{at}.{group}.adapted", [y, up])
