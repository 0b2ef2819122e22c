"""The decoder as nodes: exactly docs/graph.md, in the words of the graph's dialect.

Reads no weights: initializers are references into the data file that `layout` laid out. Nodes are
named after what they compute, and a node's value has its node's name unless the contract names it.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph.attention import Attention
from remora_build.graph.ends import embedded, logits
from remora_build.graph.experts import Experts
from remora_build.graph.forms import Forms
from remora_build.graph.kit import Kit
from remora_build.graph.layout import Slot
from remora_build.graph.linear import GateInputs, Linear
from remora_build.graph.matrix import MatrixWeights
from remora_build.graph.mlp import Mlp
from remora_build.graph.nodes import Nodes
from remora_build.graph.ops import dialect_of
from remora_build.graph.steps import add_inputs, add_steps
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec

DATA_FILE = "model.onnx.data"


def build_graph(
    spec: DecoderSpec, graph: GraphSpec, slots: dict[str, Slot], forms: Forms | None = None
) -> ir.Model:
    """The model, its weights still to be written to DATA_FILE at the slots' offsets."""
    nodes = Nodes(slots, DATA_FILE, graph.opset)
    ops = dialect_of(nodes, spec, graph)
    inputs = add_inputs(nodes, spec, graph)
    gates = GateInputs(nodes, spec, graph)
    steps = add_steps(nodes, ops, spec, graph, inputs)
    weights = MatrixWeights(nodes, graph, forms)
    kit = Kit(nodes, ops, spec, graph, weights, Linear(nodes, spec, graph, weights, gates))
    mlp = Mlp(kit)
    experts = None
    if spec.experts is not None:
        experts = Experts(kit, spec.experts, mlp, gates, inputs.position_ids)
    layers = _Layers(kit, Attention(kit, inputs, steps), mlp, experts)
    hidden = embedded(kit, inputs.input_ids)
    presents: list[ir.Value] = []
    for layer in range(spec.layers):
        hidden, present = layers.layer(layer, hidden)
        presents += present
    nodes.output(logits(kit, hidden, inputs.last_index), "float32", ["b", spec.vocab])
    for value in presents:
        nodes.output(value, graph.dtype, kit.cache_shape)
    return nodes.model(f"remora-{spec.family}")


class _Layers:
    """One decoder layer after the other on the residual stream [b, s, hidden]."""

    def __init__(self, kit: Kit, attention: Attention, mlp: Mlp, experts: Experts | None) -> None:
        self._kit = kit
        self._attention = attention
        self._mlp = mlp
        self._experts = experts

    def layer(self, layer: int, hidden: ir.Value) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """The stream after the layer, and its present key and value."""
        kit, block = self._kit, self._kit.spec.block
        before, behind = block != "post", block in ("post", "sandwich")
        normed = kit.layer_norm(layer, "norm_attention", hidden) if before else hidden
        attended, present = self._attention(layer, normed)
        if behind:
            attended = kit.layer_norm(layer, "norm_attention_out", attended)
        stream = self._added(layer, "attention", hidden, attended)
        if block in ("pre", "sandwich"):
            normed = kit.layer_norm(layer, "norm_mlp", stream)
        elif block == "post":
            normed = stream
        experts = self._experts if kit.spec.kind(layer).experts else None
        made = (experts or self._mlp)(layer, normed)
        if behind:
            made = kit.layer_norm(layer, "norm_mlp_out", made)
        return kit.stream(self._added(layer, "mlp", stream, made)), present

    def _added(self, layer: int, block: str, stream: ir.Value, made: ir.Value) -> ir.Value:
        """The stream with what a block made."""
        at = f"layers.{layer}"
        scaled = self._kit.scaled(f"{at}.{block}_scaled", made, self._kit.spec.residual_scale)
        output = f"{at}.output" if block == "mlp" else None
        name = f"{at}.{block}_residual"
        return self._kit.nodes.add("Add", name, [stream, scaled], output=output)
