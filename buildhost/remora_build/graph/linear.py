"""One packed projection: weight (quantized or not), bias, adapter branch.

    y = x W [+ bias] + ((x A) * gate) B        A [k, T]   B [T, n]   gate [b, 1, T]

and, in a graph that was asked for them, with DoRA's factors and the adapters' own biases:

    y = scale * (x W + ((x A) * gate) B) [+ bias] + adapter bias      both [b, 1, n]

Owns which inputs an adapter takes; knows nothing of attention or the MLP.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.families.shape import has_bias
from remora_build.graph import layout
from remora_build.graph.matrix import MatrixWeights
from remora_build.graph.nodes import Dims, Nodes
from remora_contract import targets
from remora_contract.bundle import GraphSpec, bank_groups, model_bank_groups
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import ALL_GROUPS, MODEL_GROUPS, PARTS, Group, matrix_name


class GateInputs:
    """The gate of each group, shared by all layers; none in a graph without a bank."""

    def __init__(self, nodes: Nodes, spec: DecoderSpec, graph: GraphSpec) -> None:
        used = {g for layer in range(spec.layers) for g in bank_groups(spec, graph, layer)}
        used.update(model_bank_groups(graph))
        self._gates: dict[Group, ir.Value] = {}
        for group in (g for g in ALL_GROUPS if g in used):
            shape: Dims = ["b", 1, columns(group)]
            self._gates[group] = nodes.input(targets.lora_gate(group), graph.dtype, shape)

    def get(self, group: Group) -> ir.Value | None:
        return self._gates.get(group)


def columns(group: Group) -> str:
    """The group's symbolic dimension T, the same in every layer."""
    return f"t_{group}"


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
        nodes, at = self._nodes, matrix_name(layer, group)
        y = self._weights.product(layout.group_weight(layer, group), at, x)
        bias = nodes.weight(f"{at}.bias") if has_bias(self._spec, PARTS[group][0]) else None
        return self._adapted(layer, group, x, y, bias)

    def embedding(self, input_ids: ir.Value, found: ir.Value) -> ir.Value:
        """The looked up rows [b, s, hidden], before the decoder's own scaling, with what adapters
        add to them: A is looked up by token as the table is."""
        return self._adapted(0, "embed", input_ids, found, None)

    def head(self, x: ir.Value, raw: ir.Value) -> ir.Value:
        """The head's products [b, vocab] of x [b, hidden] with what adapters add to them."""
        if self._gates.get("head") is None:
            return raw
        nodes, row = self._nodes, self._nodes.integers(1)
        wide = [
            nodes.add("Unsqueeze", name, [value, row])
            for name, value in (("head.lora_rows", x), ("head.rows", raw))
        ]
        adapted = self._adapted(0, "head", wide[0], wide[1], None)
        return nodes.add("Squeeze", "head.lora_squeezed", [adapted, row])

    def _adapted(
        self, layer: int, group: Group, x: ir.Value, y: ir.Value, bias: ir.Value | None
    ) -> ir.Value:
        """y = x W, whole: with the base's bias and all that adapters do."""
        gate = self._gates.get(group)
        scaled = gate is not None and self._graph.dora
        at = matrix_name(layer, group)
        if bias is not None and not scaled:
            y = self._nodes.add("Add", f"{at}.bias_add", [y, bias])
        if gate is None:
            return y
        y = self._nodes.add("Add", f"{at}.adapted", [y, self._branch(layer, group, x, gate)])
        if scaled:
            scale = self._vector(targets.lora_scale(layer, group), group)
            y = self._nodes.add("Mul", f"{at}.rescaled", [y, scale])
            if bias is not None:
                y = self._nodes.add("Add", f"{at}.bias_add", [y, bias])
        if self._graph.adapter_bias and group != "embed":
            added = self._vector(targets.lora_bias(layer, group), group)
            y = self._nodes.add("Add", f"{at}.rebiased", [y, added])
        return y

    def _branch(self, layer: int, group: Group, x: ir.Value, gate: ir.Value) -> ir.Value:
        """((x A) * gate) B"""
        nodes, t, at = self._nodes, columns(group), matrix_name(layer, group)
        weight = f"{at}.weight"
        k, n = layout.group_in(self._spec, group), layout.group_out(self._spec, group)
        a = nodes.input(targets.lora_a(layer, group), self._graph.dtype, [k, t])
        b = nodes.input(targets.lora_b(layer, group), self._graph.dtype, [t, n])
        if group == "embed":
            down = nodes.add("Gather", _step("lora_a", layer, group), [a, x], {"axis": 0})
        else:
            x = self._weights.branch_input(weight, at, x)
            down = nodes.add("MatMul", _step("lora_a", layer, group), [x, a])
        gated = nodes.add("Mul", _step("lora_gate", layer, group), [down, gate])
        up = nodes.add("MatMul", _step("lora_b", layer, group), [gated, b])
        return self._weights.branch_output(weight, at, up)

    def _vector(self, name: str, group: Group) -> ir.Value:
        shape: Dims = ["b", 1, layout.group_out(self._spec, group)]
        return self._nodes.input(name, self._graph.dtype, shape)


def _step(step: str, layer: int, group: Group) -> str:
    """`layers.3.lora_a.qkv`, `head.lora_a`"""
    return f"{group}.{step}" if group in MODEL_GROUPS else f"layers.{layer}.{step}.{group}"
