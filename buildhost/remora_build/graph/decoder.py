"""The decoder as nodes: exactly docs/graph.md, in the words of the graph's dialect.

Reads no weights: initializers are references into the data file that `layout` laid out. Nodes are
named after what they compute, and a node's value has its node's name unless the contract names it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.layout import Slot
from remora_build.graph.linear import GateInputs, Linear, MatrixWeights
from remora_build.graph.nodes import Dims, Nodes
from remora_build.graph.ops import Dialect, Rotation, dialect_of
from remora_contract import targets
from remora_contract.bundle import DecoderSpec, GraphSpec
from remora_contract.targets import PARTS, Projection

DATA_FILE = "model.onnx.data"


def build_graph(spec: DecoderSpec, graph: GraphSpec, slots: dict[str, Slot]) -> ir.Model:
    """The model, its weights still to be written to DATA_FILE at the slots' offsets."""
    nodes = Nodes(slots, DATA_FILE, graph.opset)
    ops = dialect_of(nodes, spec, graph)
    steps = _inputs(nodes, ops, spec, graph)
    weights = MatrixWeights(nodes, graph)
    linear = Linear(nodes, spec, graph, weights, steps.gates)
    hidden = nodes.add(
        "Gather",
        "embed.gather",
        [nodes.weight(layout.EMBED), steps.input_ids],
        {"axis": 0},
        output="embed.output",
    )
    _annotate_stream(nodes, spec, graph, hidden)
    decoder = _Layers(nodes, ops, spec, graph, linear, steps)
    presents: list[ir.Value] = []
    for layer in range(spec.layers):
        hidden, present = decoder.layer(layer, hidden)
        presents += present
    logits = _head(nodes, ops, spec, graph, weights, hidden, steps.last_index)
    nodes.output(logits, "float32", ["b", spec.vocab])
    for value in presents:
        nodes.output(value, graph.dtype, decoder.cache_shape)
    return nodes.model(f"remora-{spec.family}")


@dataclass(frozen=True)
class _Steps:
    """What every layer shares: the graph's inputs and what is computed once from them."""

    input_ids: ir.Value
    position_ids: ir.Value
    last_index: ir.Value
    pasts: list[tuple[ir.Value, ir.Value]]
    gates: GateInputs
    mask: ir.Value
    cache_index: ir.Value


def _inputs(nodes: Nodes, ops: Dialect, spec: DecoderSpec, graph: GraphSpec) -> _Steps:
    input_ids = nodes.input(targets.INPUT_IDS, "int64", ["b", "s"])
    position_ids = nodes.input(targets.POSITION_IDS, "int64", ["b", "s"])
    last_index = nodes.input(targets.LAST_INDEX, "int64", ["b", 1])
    cache: Dims = ["b", spec.kv_heads, graph.context, spec.head_dim]
    pasts = [
        (
            nodes.input(targets.past_key(layer), graph.dtype, cache),
            nodes.input(targets.past_value(layer), graph.dtype, cache),
        )
        for layer in range(spec.layers)
    ]
    return _Steps(
        input_ids,
        position_ids,
        last_index,
        pasts,
        GateInputs(nodes, graph),
        ops.mask(position_ids),
        ops.cache_index(position_ids),
    )


def _annotate_stream(
    nodes: Nodes, spec: DecoderSpec, graph: GraphSpec, value: ir.Value
) -> ir.Value:
    return nodes.annotate(value, graph.dtype, ["b", "s", spec.hidden])


def _head(
    nodes: Nodes,
    ops: Dialect,
    spec: DecoderSpec,
    graph: GraphSpec,
    weights: MatrixWeights,
    hidden: ir.Value,
    last_index: ir.Value,
) -> ir.Value:
    """logits [b, vocab] float32 of the one selected position a row."""
    chosen = nodes.add("GatherND", "head.select", [hidden, last_index], {"batch_dims": 1})
    normed = _norm(nodes, ops, spec, "norm", chosen)
    if layout.has_head(spec, graph):
        weight = weights.value(layout.HEAD, "head.dequantize")
    else:
        embedding = nodes.weight(layout.EMBED)
        weight = nodes.add("Transpose", "head.transpose", [embedding], {"perm": [1, 0]})
    raw = nodes.add("MatMul", "head.matmul", [normed, weight])
    return nodes.add("Cast", "head.cast", [raw], {"to": ir.DataType.FLOAT}, output=targets.LOGITS)


def _norm(nodes: Nodes, ops: Dialect, spec: DecoderSpec, name: str, x: ir.Value) -> ir.Value:
    return ops.rms_norm(name, x, nodes.weight(f"{name}.weight"), spec.norm_eps)


class _Layers:
    """One decoder layer after the other on the residual stream [b, s, hidden]."""

    def __init__(
        self,
        nodes: Nodes,
        ops: Dialect,
        spec: DecoderSpec,
        graph: GraphSpec,
        linear: Linear,
        steps: _Steps,
    ) -> None:
        self._nodes = nodes
        self._ops = ops
        self._spec = spec
        self._graph = graph
        self._linear = linear
        self._steps = steps

    @property
    def cache_shape(self) -> Dims:
        return ["b", self._spec.kv_heads, self._graph.context, self._spec.head_dim]

    def layer(self, layer: int, hidden: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        """The stream after the layer, and its present key and value."""
        nodes, at = self._nodes, f"layers.{layer}"
        normed = _norm(nodes, self._ops, self._spec, f"{at}.norm_attention", hidden)
        attended, present = self._attention(layer, normed)
        hidden = nodes.add("Add", f"{at}.attention_residual", [hidden, attended])
        normed = _norm(nodes, self._ops, self._spec, f"{at}.norm_mlp", hidden)
        hidden = nodes.add(
            "Add", f"{at}.mlp_residual", [hidden, self._mlp(layer, normed)], output=f"{at}.output"
        )
        return _annotate_stream(nodes, self._spec, self._graph, hidden), present

    def _attention(self, layer: int, x: ir.Value) -> tuple[ir.Value, list[ir.Value]]:
        nodes, spec, at = self._nodes, self._spec, f"layers.{layer}"
        q, k, v = self._parts(self._linear(layer, "qkv", x), layer, PARTS["qkv"])
        q = self._rotated(layer, "q", self._heads(layer, "q", q, spec.heads))
        k = self._rotated(layer, "k", self._heads(layer, "k", k, spec.kv_heads))
        v = self._swapped(layer, "v", self._heads(layer, "v", v, spec.kv_heads))
        past_key, past_value = self._steps.pasts[layer]
        key = self._written(f"{at}.k", past_key, k, targets.present_key(layer))
        value = self._written(f"{at}.v", past_value, v, targets.present_value(layer))
        scale = float(spec.head_dim) ** -0.5
        mixed = self._ops.attend(f"{at}.attention", q, key, value, self._steps.mask, scale=scale)
        swapped = nodes.add(
            "Transpose", f"{at}.attention.transpose", [mixed], {"perm": [0, 2, 1, 3]}
        )
        shape = nodes.integers(0, 0, spec.heads * spec.head_dim)
        merged = nodes.add("Reshape", f"{at}.attention.merge", [swapped, shape])
        return self._linear(layer, "o", merged), [key, value]

    def _mlp(self, layer: int, x: ir.Value) -> ir.Value:
        nodes, at = self._nodes, f"layers.{layer}"
        gate, up = self._parts(self._linear(layer, "gate_up", x), layer, PARTS["gate_up"])
        sigmoid = nodes.add("Sigmoid", f"{at}.gate.sigmoid", [gate])
        silu = nodes.add("Mul", f"{at}.gate.silu", [gate, sigmoid])
        return self._linear(layer, "down", nodes.add("Mul", f"{at}.mlp.product", [silu, up]))

    def _parts(self, packed: ir.Value, layer: int, parts: tuple[Projection, ...]) -> list[ir.Value]:
        """Slices of the last axis in packed order."""
        nodes, values, begin = self._nodes, [], 0
        for part in parts:
            end = begin + self._spec.out_features(part)
            bounds = [nodes.integers(begin), nodes.integers(end), nodes.integers(2)]
            values.append(nodes.add("Slice", f"layers.{layer}.{part}.slice", [packed, *bounds]))
            begin = end
        return values

    def _heads(self, layer: int, part: Projection, x: ir.Value, heads: int) -> ir.Value:
        """[b, s, heads, head_dim]"""
        shape = self._nodes.integers(0, 0, heads, self._spec.head_dim)
        return self._nodes.add("Reshape", f"layers.{layer}.{part}.heads", [x, shape])

    def _swapped(self, layer: int, part: Projection, x: ir.Value) -> ir.Value:
        """[b, heads, s, head_dim]"""
        name = f"layers.{layer}.{part}.transpose"
        return self._nodes.add("Transpose", name, [x], {"perm": [0, 2, 1, 3]})

    def _rotated(self, layer: int, part: Projection, x: ir.Value) -> ir.Value:
        nodes, at = self._nodes, f"layers.{layer}.{part}"
        if self._spec.qk_norm != "none":
            x = _norm(nodes, self._ops, self._spec, f"{at}_norm", x)
        cos, sin = nodes.weight(layout.ROPE_COS), nodes.weight(layout.ROPE_SIN)
        rotation = Rotation(cos, sin, self._steps.position_ids)
        return self._ops.rotate(f"{at}.rope", self._swapped(layer, part, x), rotation)

    def _written(self, at: str, past: ir.Value, new: ir.Value, present: str) -> ir.Value:
        index = self._steps.cache_index
        return self._ops.write_cache(f"{at}.scatter", past, new, index, output=present)
