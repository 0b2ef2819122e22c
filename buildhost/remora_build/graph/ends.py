"""Both ends of the decoder: tokens -> residual stream, residual stream -> logits."""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.kit import Kit
from remora_contract import targets

EMBEDDED = "embed.output"


def embedded(kit: Kit, input_ids: ir.Value) -> ir.Value:
    """[b, s, hidden]"""
    nodes, factor = kit.nodes, kit.spec.embedding_scale
    table = nodes.weight(layout.EMBED)
    found = nodes.add("Gather", "embed.gather", [table, input_ids], {"axis": 0})
    found = kit.linear.embedding(input_ids, found)
    if factor == 1.0:
        found.name = EMBEDDED
    return kit.stream(kit.scaled("embed.scaled", found, factor, output=EMBEDDED))


def logits(kit: Kit, hidden: ir.Value, last_index: ir.Value) -> ir.Value:
    """[b, vocab] float32 of the one selected position a row."""
    nodes = kit.nodes
    chosen = nodes.add("GatherND", "head.select", [hidden, last_index], {"batch_dims": 1})
    normed = kit.final_norm(chosen)
    if layout.has_head(kit.spec, kit.graph):
        raw = kit.weights.product(layout.HEAD, "head", normed, rank=2)
    else:
        embedding = nodes.weight(layout.EMBED)
        weight = nodes.add("Transpose", "head.transpose", [embedding], {"perm": [1, 0]})
        raw = nodes.add("MatMul", "head.matmul", [normed, weight])
    return _finished(kit, kit.linear.head(normed, raw))


def _finished(kit: Kit, raw: ir.Value) -> ir.Value:
    """cap * tanh(raw * scale / cap), in float32; without scale or cap less of it."""
    nodes, scale, cap = kit.nodes, kit.spec.logit_scale, kit.spec.logit_softcap
    last = "head.cast" if scale == 1.0 else "head.scaled"
    last = last if cap is None else "head.capped"

    def step(op: str, name: str, operands: list[ir.Value]) -> ir.Value:
        attributes = {"to": ir.DataType.FLOAT} if op == "Cast" else {}
        output = targets.LOGITS if name == last else None
        return nodes.add(op, name, operands, attributes, output=output)

    value = step("Cast", "head.cast", [raw])
    if scale != 1.0:
        value = step("Mul", "head.scaled", [value, nodes.number(scale, "float32")])
    if cap is not None:
        number = nodes.number(cap, "float32")
        ratio = step("Div", "head.cap_ratio", [value, number])
        value = step("Mul", "head.capped", [step("Tanh", "head.cap_tanh", [ratio]), number])
    return value
