"""What makes a portable graph one that no runtime takes and computes wrongly (docs/graph.md, "Never
emitted"). Pure: reads the model, answers with every finding. Needs onnx-ir, as whoever writes and
whoever builds has; the rest of the contract does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from remora_contract import trt103
from remora_contract.bundle import GraphDialect

_FORBIDDEN_ATTRIBUTES = {"Attention": ("is_causal", "softcap", "qk_matmul_output_mode")}
_MAX_ATTENTION_INPUTS = 4  # q, k, v, mask; then past_key, past_value, nonpad_kv_seqlen
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.FLOAT)


def findings(model: ir.Model, dialect: GraphDialect) -> list[str]:
    """Every rule of its dialect that the graph breaks, one line each; empty when it keeps them."""
    found = list(lint(model))
    if dialect == "legacy":
        found += trt103.refusals(model, element_types(model))
    return found


def lint(model: ir.Model) -> Iterator[str]:
    """One line a finding, naming the node or value."""
    graph = model.graph
    for domain in graph.opset_imports:
        if domain != "":
            yield f"operator set {domain!r} beside the default one"
    names: set[str] = set()
    for node in RecursiveGraphIterator(graph):
        yield from _lint_node(node)
        if not node.name or node.name in names:
            yield f"node name {node.name!r} is missing or used twice"
        names.add(node.name or "")
    yield from _lint_values(graph)


def element_types(model: ir.Model) -> dict[str, str]:
    """The element type of every value that ONNX can derive, by its name: `FLOAT16`."""
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model))
    typed = _element_types(proto.graph)
    return {name: onnx.TensorProto.DataType.Name(kind) for name, kind in typed.items()}


def _element_types(graph: onnx.GraphProto) -> dict[str, int]:
    typed = {i.name: i.data_type for i in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        typed[value.name] = value.type.tensor_type.elem_type
    bodies = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    for body in bodies:
        typed |= _element_types(body)
    return typed


def _lint_node(node: ir.Node) -> Iterator[str]:
    if node.domain:
        yield f"{node.name}: operator {node.domain}::{node.op_type} is not standard"
    for attribute in _FORBIDDEN_ATTRIBUTES.get(node.op_type, ()):
        if attribute in node.attributes:
            yield f"{node.name}: attribute {attribute}"
    if node.op_type == "Attention":
        yield from _lint_attention(node)


def _lint_attention(node: ir.Node) -> Iterator[str]:
    extra = [i for i, v in enumerate(node.inputs) if v is not None and i >= _MAX_ATTENTION_INPUTS]
    if extra:
        yield f"{node.name}: past_key, past_value or nonpad_kv_seqlen is given"
    if len(node.outputs) != 1:
        yield f"{node.name}: more outputs than the mixed values"
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        yield f"{node.name}: no mask, so nothing hides the future"
    elif _producer_op(mask) != "Where":
        yield f"{node.name}: its mask is not the float mask made by Where"


def _producer_op(value: ir.Value) -> str | None:
    producer = value.producer()
    return None if producer is None else producer.op_type


def _lint_values(graph: ir.Graph) -> Iterator[str]:
    for value in graph.inputs:
        if not value.uses():
            yield f"input {value.name} is unused"
        if value.dtype not in (*_FLOATS, ir.DataType.INT64):
            yield f"input {value.name} is {value.dtype}"
    for value in graph.initializers.values():
        if not value.uses():
            yield f"initializer {value.name} is unused"
        if value.dtype == ir.DataType.UINT4:
            yield f"initializer {value.name} is UINT4"
    for node in RecursiveGraphIterator(graph):
        for value in node.outputs:
            if not value.uses() and not value.is_graph_output():
                yield f"{node.name}: nobody reads {value.name}"
