"""weight * x / sqrt(mean(x^2) + epsilon) -> RMSNormalization."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import (
    Editor,
    constant,
    input_of,
    only_user,
    producer,
    refuse,
    tensor,
)


def join_norms(editor: Editor) -> None:
    """Rewrites every ReduceMean of a square. Raises EngineFault when what follows is no norm."""
    for mean in editor.nodes("ReduceMean"):
        square = producer(input_of(mean, 0), "Mul", mean)
        if input_of(square, 0) is not input_of(square, 1):
            refuse(mean, "expected the mean of a square")
        _join(editor, mean, input_of(square, 0))


def _join(editor: Editor, mean: ir.Node, wide: ir.Value) -> None:
    if constant(mean, 1).tolist() != [-1]:
        refuse(mean, "expected it over the last axis")
    shifted = only_user(mean.outputs[0], "Add", mean)
    epsilon = constant(shifted, 1).reshape(-1)
    root = only_user(shifted.outputs[0], "Sqrt", shifted)
    ratio = only_user(root.outputs[0], "Div", root)
    if len(epsilon) != 1 or input_of(ratio, 0) is not wide:
        refuse(ratio, "expected x / sqrt(mean(x^2) + epsilon)")
    scaled = only_user(_through_cast(ratio), "Mul", ratio)
    weight = tensor(scaled, 1)
    normed = _normed(editor, scaled, _before_cast(wide), weight, float(epsilon[0]))
    editor.replace(scaled.outputs[0], normed)


def _normed(
    editor: Editor, scaled: ir.Node, x: ir.Value, weight: ir.TensorProtocol, epsilon: float
) -> ir.Value:
    """One weight a head is multiplied after a norm of ones."""
    name, last = f"{scaled.name}.joined", int(weight.shape.numpy()[-1])
    attributes = {"axis": -1, "epsilon": epsilon}
    of_heads = len(weight.shape.numpy()) > 1
    ones = np.ones(last, np.float32)
    scale = editor.initializer(ones, f"const.ones.{last}") if of_heads else input_of(scaled, 1)
    (normed,) = editor.emit("RMSNormalization", [x, scale], name, attributes=attributes)
    if of_heads:
        (normed,) = editor.emit("Mul", [normed, input_of(scaled, 1)], f"{name}.by_head")
    return normed


def _through_cast(ratio: ir.Node) -> ir.Value:
    """Back in the graph's dtype, if it is another than float32."""
    value = ratio.outputs[0]
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type == "Cast":
        value = users[0].outputs[0]
    return value


def _before_cast(wide: ir.Value) -> ir.Value:
    cast = wide.producer()
    return input_of(cast, 0) if cast is not None and cast.op_type == "Cast" else wide
