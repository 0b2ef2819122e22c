"""RMSNormalization -> SimplifiedLayerNormalization; with the residual Add before it, one
SkipSimplifiedLayerNormalization, whose fourth output is the new residual stream."""

from __future__ import annotations

import onnx_ir as ir

from remora_agent.engine.ort import names
from remora_agent.engine.ort.rewrite.edit import (
    MICROSOFT,
    Editor,
    input_of,
    integer,
    no_more_inputs,
    number,
    refuse,
)


def fuse_norms(editor: Editor) -> None:
    """Rewrites every RMSNormalization. Raises EngineFault on another axis or precision."""
    for node in editor.nodes("RMSNormalization"):
        no_more_inputs(node, 2)
        if integer(node, "axis", -1) != -1 or integer(node, "stash_type", 1) != 1:
            refuse(node, "expected normalization over the last axis in float32")
        residual = _residual_add(input_of(node, 0))
        if residual is None:
            _plain(editor, node)
        else:
            _skip(editor, node, residual)


def _plain(editor: Editor, node: ir.Node) -> None:
    (normed,) = editor.emit(
        "SimplifiedLayerNormalization",
        [input_of(node, 0), input_of(node, 1)],
        f"{node.name}.simplified",
        attributes={"axis": -1, "epsilon": number(node, "epsilon", 1e-5), "stash_type": 1},
    )
    editor.replace(node.outputs[0], normed)


def _skip(editor: Editor, node: ir.Node, add: ir.Node) -> None:
    name = f"{node.name}.skip"
    normed, _, _, stream = editor.emit(
        "SkipSimplifiedLayerNormalization",
        [input_of(add, 0), input_of(add, 1), input_of(node, 1)],
        name,
        domain=MICROSOFT,
        outputs=[name, "", "", f"{add.outputs[0].name}.stream"],
        attributes={"epsilon": number(node, "epsilon", 1e-5)},
    )
    editor.replace(node.outputs[0], normed)
    editor.replace(add.outputs[0], stream)


def _residual_add(value: ir.Value) -> ir.Node | None:
    """The Add of two computed values that makes `value`, if one does."""
    node = value.producer()
    if node is None or node.op_type != "Add" or node.domain not in ("", "ai.onnx"):
        return None
    if any(v is None or v.is_initializer() for v in node.inputs) or names.is_adapted(node.name):
        return None
    return node
