"""Attention in plain operators -> one Attention, so that the other rewrites meet one spelling.

    scores = (q * scale) k'        [by groups of heads that share keys]
    heads  = softmax(cap * tanh(scores / cap) + mask) v

Softmax is where it is found; another Softmax (of a router) is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import (
    Editor,
    constant,
    input_of,
    integer,
    only_user,
    producer,
    refuse,
)

_THROUGH = ("Reshape", "Cast")


def join_attention(editor: Editor) -> None:
    """Rewrites every Softmax over masked scores. Raises EngineFault on a shape it does not know."""
    for softmax in editor.nodes("Softmax"):
        masked = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
        if masked is not None and masked.op_type == "Add" and _mask_of(masked) is not None:
            _join(editor, softmax, masked)


def _join(editor: Editor, softmax: ir.Node, masked: ir.Node) -> None:
    mask = _mask_of(masked)
    attributes: dict[str, float] = {}
    scores, cap = _uncapped(_back(input_of(masked, 0)))
    if cap is not None:
        attributes["softcap"] = cap
    product = producer(_back(scores), "MatMul", masked)
    scaled = producer(_back(input_of(product, 0)), "Mul", product)
    attributes["scale"] = _scalar(scaled)
    keys = producer(input_of(product, 1), "Transpose", product)
    if list(keys.attributes["perm"].as_ints()) != [0, 1, 3, 2]:
        refuse(keys, "expected keys turned on their last two axes")
    if integer(softmax, "axis", -1) not in (-1, 3):
        refuse(softmax, "expected it over the last axis")
    weighted, mixed = _forward(softmax)
    inputs = [input_of(scaled, 0), input_of(keys, 0), input_of(weighted, 1), mask]
    name = f"{softmax.name}.joined"
    (joined,) = editor.emit("Attention", inputs, name, attributes=attributes)
    editor.replace(mixed, joined)


def _mask_of(add: ir.Node) -> ir.Value | None:
    """The mask that is added, made by Where; None when nothing like it is."""
    value = _back(add.inputs[1]) if add.inputs[1] is not None else None
    node = None if value is None else value.producer()
    return value if node is not None and node.op_type == "Where" else None


def _back(value: ir.Value) -> ir.Value:
    """Before reshapes and casts."""
    while (node := value.producer()) is not None and node.op_type in _THROUGH:
        value = input_of(node, 0)
    return value


def _uncapped(scores: ir.Value) -> tuple[ir.Value, float | None]:
    """Scores before cap * tanh(scores / cap), and the cap."""
    multiply = scores.producer()
    bounded = None if multiply is None else input_of(multiply, 0).producer()
    if multiply is None or multiply.op_type != "Mul" or bounded is None:
        return scores, None
    if bounded.op_type != "Tanh":
        return scores, None
    divide = producer(input_of(bounded, 0), "Div", bounded)
    cap = _scalar(multiply)
    if _scalar(divide) != cap:
        refuse(divide, "expected the cap that is multiplied with afterwards")
    return input_of(divide, 0), cap


def _scalar(node: ir.Node) -> float:
    value = constant(node, 1).reshape(-1)
    if len(value) != 1:
        refuse(node, "expected one number")
    return float(value[0])


def _forward(softmax: ir.Node) -> tuple[ir.Node, ir.Value]:
    """The product with the values, and its result as [b, heads, s, hd]."""
    value = softmax.outputs[0]
    while (node := next(iter(value.uses())).node).op_type in _THROUGH:
        only_user(value, node.op_type, softmax)
        value = node.outputs[0]
    weighted = only_user(value, "MatMul", softmax)
    mixed = weighted.outputs[0]
    users = [use.node for use in mixed.uses()]
    if len(users) == 1 and users[0].op_type == "Reshape":
        mixed = users[0].outputs[0]
    return weighted, mixed
