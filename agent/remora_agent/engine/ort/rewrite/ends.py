"""The two ends of the decoder: embedding lookup, choice of positions, head.

The embedding stays in its own precision and is cast after the lookup, so that of a mapped file only
the touched rows cost memory. A tied head multiplies by the table as it lies: Gemm with transB.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort import names
from remora_agent.engine.ort.rewrite.edit import (
    Editor,
    input_of,
    integer,
    no_more_inputs,
    refuse,
    tensor,
    widened,
)
from remora_agent.engine.ort.rewrite.experts import is_tiling
from remora_contract import targets
from remora_contract.decoder import DecoderSpec

_FLOAT16 = ir.DataType.FLOAT16
_NORMS = ("RMSNormalization", "LayerNormalization")


def widen_embedding(editor: Editor) -> None:
    """A Cast to float32 after each lookup in a float16 table."""
    for gather in editor.nodes("Gather"):
        table = input_of(gather, 0)
        if not table.is_initializer() or not gather.outputs[0].uses():
            continue
        if input_of(gather, 1).name == targets.POSITION_IDS:
            continue
        if input_of(gather, 1).name != targets.INPUT_IDS or integer(gather, "axis", 0) != 0:
            refuse(gather, f"expected a lookup of {targets.INPUT_IDS}")
        if tensor(gather, 0).dtype == _FLOAT16:
            _cast_after(editor, gather)


def _cast_after(editor: Editor, gather: ir.Node) -> None:
    users = tuple(gather.outputs[0].uses())
    attributes = {"to": int(ir.DataType.FLOAT)}
    name = f"{gather.name}.widened"
    (value,) = editor.emit("Cast", [gather.outputs[0]], name, attributes=attributes)
    for user, index in users:
        user.replace_input_with(index, value)


def choose_positions(editor: Editor, decoder: DecoderSpec) -> None:
    """GatherND(hidden, last_index), one position a row -> those that `state_index` names of all
    tokens; their normed states are an output, and `logits_index` names those that get logits."""
    for gather in editor.nodes("GatherND"):
        if input_of(gather, 0).name == targets.POSITION_IDS:  # has rows and tokens as they are
            continue
        if integer(gather, "batch_dims", 0) != 1:
            refuse(gather, "expected batch_dims 1")
        if input_of(gather, 1).name != targets.LAST_INDEX:
            refuse(gather, f"expected the input {targets.LAST_INDEX}")
        flat = editor.initializer(np.array([-1, decoder.hidden], np.int64), "const.flat_states")
        (tokens,) = editor.emit("Reshape", [input_of(gather, 0), flat], f"{gather.name}.tokens")
        index = editor.input(names.STATE_INDEX, ir.DataType.INT64, ["n"])
        (chosen,) = editor.emit("Gather", [tokens, index], f"{gather.name}.states")
        _output_states(editor, _final_norm(gather))
        editor.replace(gather.outputs[0], chosen)


def _final_norm(gather: ir.Node) -> ir.Value:
    users = [use.node for use in gather.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type not in _NORMS:
        refuse(gather, "expected exactly the final norm after it")
    return users[0].outputs[0]


def _output_states(editor: Editor, normed: ir.Value) -> None:
    """[n, hidden] of the norm goes out; the head reads [k, hidden] of it."""
    users = tuple(normed.uses())
    index = editor.input(names.LOGITS_INDEX, ir.DataType.INT64, ["k"])
    (headed,) = editor.emit("Gather", [normed, index], "head.states")
    for user, at in users:
        user.replace_input_with(at, headed)
    normed.name = names.STATES
    editor.graph.outputs.append(normed)


def fuse_tied_head(editor: Editor) -> None:
    """MatMul(x [b, hidden], Transpose(table)) -> Gemm(x, table, transB)."""
    for transpose in editor.nodes("Transpose"):
        table = input_of(transpose, 0)
        if not table.is_initializer() or not transpose.outputs[0].uses():
            continue
        (use,) = transpose.outputs[0].uses()
        if use.node.op_type != "MatMul" or use.idx != 1:
            refuse(transpose, "expected a tied head: MatMul(x, Transpose(table))")
        weight = table
        if tensor(transpose, 0).dtype == _FLOAT16:
            weight = editor.lazy(widened(tensor(transpose, 0), f"{table.name}.head"))
        inputs = [input_of(use.node, 0), weight]
        (logits,) = editor.emit("Gemm", inputs, f"{use.node.name}.tied", attributes={"transB": 1})
        editor.replace(use.node.outputs[0], logits)


def drop_final_cast(editor: Editor) -> None:
    """Everything is float32 already, so a Cast to it does nothing."""
    for cast in editor.nodes("Cast"):
        if is_tiling(cast):
            continue
        source = input_of(cast, 0).producer()
        no_more_inputs(cast, 1)
        if integer(cast, "to", 0) not in (int(ir.DataType.FLOAT), int(_FLOAT16)):
            refuse(cast, "expected casts between floats only")
        if source is None or source.op_type != "Gather":
            editor.replace(cast.outputs[0], input_of(cast, 0))


def widen_rest(editor: Editor) -> None:
    """Every float16 initializer that is not a table of embeddings becomes float32."""
    for value in tuple(editor.graph.initializers.values()):
        used_by = {use.node.op_type for use in value.uses()}
        if value.dtype != _FLOAT16 or not used_by or used_by == {"Gather"}:
            continue
        assert value.const_value is not None  # an initializer has one
        wide = editor.lazy(widened(value.const_value, f"{value.name}.widened"))
        for user, index in tuple(value.uses()):
            if user.op_type != "Gather":
                user.replace_input_with(index, wide)
