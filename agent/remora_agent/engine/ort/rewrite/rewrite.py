"""The portable graph -> the form ONNX Runtime runs fast, all in float32, opset 21 and
com.microsoft operators only (ONNX Runtime 1.23 takes it).

Each idea is one file beside this one. What remains at the end must be made of known operators and
read known inputs: a node that was not understood is refused by name, never passed on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass

from remora_agent.engine.ort import names
from remora_agent.engine.ort.rewrite import (
    adapters,
    attention,
    ends,
    experts,
    matmul,
    mlp,
    norms,
    slices,
    stored,
)
from remora_agent.engine.ort.rewrite.edit import MICROSOFT, Editor, refuse
from remora_agent.engine.ort.rewrite.plain import join_plain
from remora_contract import targets
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import EngineFault

# Part of the build key: raise it whenever the rewritten bytes change.
REWRITE_VERSION = 5
_OPSET = 21
_IR_VERSION = 10
_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16)

_KNOWN = {
    ("", "Add"),
    ("", "Cast"),
    ("", "Concat"),
    ("", "DequantizeLinear"),
    ("", "Div"),
    ("", "Gather"),
    ("", "GatherND"),
    ("", "GreaterOrEqual"),
    ("", "Gelu"),
    ("", "Gemm"),
    ("", "LayerNormalization"),
    ("", "MatMul"),
    ("", "Mul"),
    ("", "QuantizeLinear"),
    ("", "Reshape"),
    ("", "SimplifiedLayerNormalization"),
    ("", "Split"),
    ("", "Squeeze"),
    ("", "Tanh"),
    ("", "Unsqueeze"),
    ("", "Where"),
    (MICROSOFT, "GroupQueryAttention"),
    (MICROSOFT, "MatMulNBits"),
    (MICROSOFT, "QuickGelu"),
    (MICROSOFT, "RotaryEmbedding"),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"),
}
# What the kernels know without, in most models.
_OFTEN_UNUSED = (targets.POSITION_IDS, targets.LAST_INDEX)
_INPUTS = re.compile(
    rf"{targets.INPUT_IDS}|{targets.POSITION_IDS}|{targets.LAST_INDEX}|{targets.SEQUENCE_LENGTH}"
    rf"|{names.BATCH_SHAPE}|{names.GROUP_SHAPE}|{names.LAST_POSITION}|{names.TOTAL_LENGTH}|past_(key|value)\.\d+|slot_(a|b|scale|bias)\.\d+\.\w+"
    rf"|{names.SLOT_EMBED}|{names.STATE_INDEX}|{names.LOGITS_INDEX}|slot_gate\.\w+"
)


@dataclass(frozen=True)
class Rewritten:
    """What the rewrite did, for the log and the cache."""

    nodes: int
    adapter_branches: int


def rewrite(
    model: ir.Model, decoder: DecoderSpec, accuracy_level: int, window_excess: int = 0
) -> Rewritten:
    """Changes the model in place; `window_excess` as `attention.fuse_attention` says.

    Raises EngineFault naming the node it does not understand.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True)(model)
    editor = Editor(model.graph)
    stored.widen_float_codes(editor)
    join_plain(editor)
    attention.fuse_attention(editor, decoder, window_excess)
    _drop_dead(model)
    slices.merge_slices(editor)
    _drop_dead(model)  # else the slices still read what was cut, and no branch finds its Split
    branches = adapters.group_adapters(editor, decoder)
    mlp.fuse_silu(editor)
    experts.adapt_experts(editor, decoder)
    ends.fuse_tied_head(editor)
    ends.drop_final_cast(editor)
    ends.widen_embedding(editor)
    ends.choose_positions(editor, decoder)
    matmul.fuse_integers(editor, accuracy_level)
    norms.fuse_norms(editor)
    _drop_dead(model)
    ends.widen_rest(editor)
    _drop_dead(model)
    _finish(model)
    check(model.graph, decoder)
    return Rewritten(model.graph.num_nodes(), branches)


def check(graph: ir.Graph, decoder: DecoderSpec) -> None:
    """Known operators and inputs, one attention and one cache a layer. Raises EngineFault."""
    known = _KNOWN | experts.KNOWN if decoder.experts else _KNOWN
    for node in graph.all_nodes():
        if (node.domain, node.op_type) not in known:
            refuse(node, "no rewrite took it")
    for value in graph.inputs:
        if not _INPUTS.fullmatch(value.name or ""):
            raise EngineFault(f"graph input {value.name!r} stays after the rewrite")
        if not value.uses():
            raise EngineFault(f"graph input {value.name!r} is read by no node after the rewrite")
    fused = sum(node.op_type == "GroupQueryAttention" for node in graph)
    if fused != decoder.layers:
        raise EngineFault(f"the graph has {fused} attentions for {decoder.layers} layers")
    outputs = {v.name for v in graph.outputs}
    wanted = {targets.LOGITS, names.STATES}
    for layer in range(decoder.layers):
        wanted |= {targets.present_key(layer), targets.present_value(layer)}
    if outputs != wanted:
        raise EngineFault(f"the graph's outputs differ: {sorted(map(str, outputs ^ wanted))[:3]}")


def _drop_dead(model: ir.Model) -> None:
    RemoveUnusedNodesPass()(model)


def _finish(model: ir.Model) -> None:
    """Float32 inputs of dynamic shape, no stale types, an order that runs."""
    graph = model.graph
    for value in tuple(graph.inputs):
        if value.name in _OFTEN_UNUSED and not value.uses():
            graph.inputs.remove(value)
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)
        if value.name == targets.INPUT_IDS:
            value.shape = ir.Shape(["g", "m"])
        elif (value.name or "").startswith("past_") and value.shape is not None:
            value.shape = ir.Shape(["b", value.shape[1], "capacity", value.shape[3]])
    outputs = set(graph.outputs)
    for node in graph.all_nodes():
        node.version = None
        for value in node.outputs:
            value.shape = None
            if value not in outputs and value.dtype in _FLOATS:
                value.type = None
            elif value in outputs:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    for loop in (node for node in graph if node.op_type == "Loop"):
        for value in loop.attributes["body"].as_graph().outputs:
            if value.dtype == ir.DataType.FLOAT16 or value.type is None:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    graph.sort()
    graph.opset_imports.clear()
    graph.opset_imports.update({"": _OPSET, MICROSOFT: 1})
    model.ir_version = _IR_VERSION
