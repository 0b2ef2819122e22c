"""A mixture of experts stays what it is: a loop over tiles of tokens that share an expert, in which
only that expert's matrices are read. What changes is precision and the shape of the stream.

Whole-number nodes choose the tiles; their casts are no changes of precision. Float nodes become
float32: stacks of matrices stay as they are stored, and what is cut out of them is widened.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from remora_agent.engine.ort import names
from remora_agent.engine.ort.rewrite.edit import Editor, input_of, integer, refuse
from remora_contract.decoder import DecoderSpec

_FLOATS = (int(ir.DataType.FLOAT), int(ir.DataType.FLOAT16))
_TILING = re.compile(r"experts\.|layers\.\d+\.experts\.")
_OUTPUT = re.compile(r"layers\.\d+\.experts\.output")
# What chooses tiles, routes, and takes codes apart.
KNOWN = {
    ("", op)
    for op in (
        "CumSum", "Equal", "Expand", "Floor", "Identity", "LessOrEqual", "Loop", "Min", "Mod",
        "Range", "ReduceSum", "ScatterElements", "Shape", "Sigmoid", "Slice", "Softmax", "Squeeze",
        "Sub", "TopK",
    )
}  # fmt: skip


def is_tiling(node: ir.Node) -> bool:
    """Does it compute which tokens go to which expert, in whole numbers?"""
    return _TILING.match(node.name or "") is not None


def adapt_experts(editor: Editor, decoder: DecoderSpec) -> None:
    """Changes every loop in place. Raises EngineFault on a layer of experts without one."""
    loops = editor.nodes("Loop")
    layers = sum(decoder.kind(layer).experts for layer in range(decoder.layers))
    if len(loops) != layers:
        where = loops[0] if loops else next(iter(editor.graph))
        refuse(where, f"expected a loop for each of {layers} layers of experts")
    for loop in loops:
        _widen_body(loop.attributes["body"].as_graph())
    for reshape in editor.nodes("Reshape"):
        if _OUTPUT.fullmatch(reshape.name or ""):
            shape = editor.input(names.GROUP_SHAPE, ir.DataType.INT64, [3])
            reshape.replace_input_with(1, shape)


def _widen_body(body: ir.Graph) -> None:
    for node in tuple(body):
        if node.op_type == "Cast" and integer(node, "to", 0) == int(ir.DataType.FLOAT16):
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        if node.op_type == "Gather" and _stored_narrow(input_of(node, 0)):
            _widen_after(body, node)


def _stored_narrow(value: ir.Value) -> bool:
    return value.is_initializer() and value.dtype == ir.DataType.FLOAT16


def _widen_after(body: ir.Graph, gather: ir.Node) -> None:
    """A Cast behind what is cut out of a stack; behind its Reshape where one follows at once, for
    a product that reads the cut itself would have the whole stack cast."""
    last = gather
    users = [use.node for use in gather.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Reshape":
        last = users[0]
    cut = last.outputs[0]
    readers = tuple(cut.uses())
    cast = ir.node("Cast", [cut], {"to": int(ir.DataType.FLOAT)}, name=f"{last.name}.widened")
    cast.outputs[0].name = cast.name
    body.insert_after(last, cast)
    for user, index in readers:
        user.replace_input_with(index, cast.outputs[0])
