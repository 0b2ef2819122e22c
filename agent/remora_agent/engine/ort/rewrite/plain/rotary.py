"""Rotary embedding of plain operators -> RotaryEmbedding.

    (a, b) -> (a cos - b sin, a sin + b cos)        cos, sin looked up at the rows' positions

Found by its only subtraction of products; the halves or the neighbours of a head are its pairs.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import (
    Editor,
    constant,
    input_of,
    only_user,
    producer,
    refuse,
)


def join_rotary(editor: Editor) -> None:
    """Rewrites every a cos - b sin. Raises EngineFault when the rest of the rotation differs."""
    for difference in editor.nodes("Sub"):
        if all(v is not None and _is_product(v) for v in difference.inputs):
            _join(editor, difference)


def _is_product(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Mul"


def _join(editor: Editor, difference: ir.Node) -> None:
    a_cos = producer(input_of(difference, 0), "Mul", difference)
    b_sin = producer(input_of(difference, 1), "Mul", difference)
    first, second = (producer(input_of(n, 0), "Slice", n) for n in (a_cos, b_sin))
    cos, sin = (_lookup(n) for n in (a_cos, b_sin))
    if input_of(cos, 1) is not input_of(sin, 1) or input_of(first, 0) is not input_of(second, 0):
        refuse(difference, "expected pairs of one head, turned at one position")
    interleaved = _steps(first) == 2
    turned, source, dims = _whole(_result(difference, interleaved), first)
    attributes = {"interleaved": int(interleaved)}
    if dims is not None:
        attributes["rotary_embedding_dim"] = dims
    inputs = [source, input_of(cos, 0), input_of(sin, 0), input_of(cos, 1)]
    name = f"{difference.name}.joined"
    (joined,) = editor.emit("RotaryEmbedding", inputs, name, attributes=attributes)
    editor.replace(turned, joined)


def _lookup(product: ir.Node) -> ir.Node:
    """Gather(table, positions) behind a factor [b, 1, s, pairs]."""
    column = producer(input_of(product, 1), "Unsqueeze", product)
    return producer(input_of(column, 0), "Gather", column)


def _steps(cut: ir.Node) -> int:
    return int(constant(cut, 4)[0]) if len(cut.inputs) > 4 else 1


def _result(difference: ir.Node, interleaved: bool) -> ir.Value:
    """The turned pairs put together again."""
    if not interleaved:
        return only_user(difference.outputs[0], "Concat", difference).outputs[0]
    column = only_user(difference.outputs[0], "Unsqueeze", difference)
    pairs = only_user(column.outputs[0], "Concat", column)
    return only_user(pairs.outputs[0], "Reshape", pairs).outputs[0]


def _whole(turned: ir.Value, first: ir.Node) -> tuple[ir.Value, ir.Value, int | None]:
    """The rotated head, the head before, and how many dimensions turn when not all do."""
    source = input_of(first, 0)
    users = [use.node for use in turned.uses()]
    cut = source.producer()
    if len(users) != 1 or users[0].op_type != "Concat" or cut is None or cut.op_type != "Slice":
        return turned, source, None
    if int(constant(cut, 1)[0]) != 0:
        refuse(cut, "expected the leading dimensions to turn")
    return users[0].outputs[0], input_of(cut, 0), int(constant(cut, 2)[0])
