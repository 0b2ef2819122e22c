"""Where a branch joins a linear layer: the value it reads, and the value it is added to.

    x -> [scale of AWQ or SmoothQuant] -> [reordering of GPTQ] -> [quantize -> dequantize] -> W -> y

An adapter was trained on x: the branch reads it *before* every one of these. It is added after a
bias, and after a quantization of y, whose range was measured without adapters.
Pure: reads a GraphView.
"""

from __future__ import annotations

import re
from typing import Any

from remora_build.insert.patterns import Linear
from remora_build.insert.shown import shown
from remora_build.insert.view import (
    SAME_ELEMENTS,
    GraphView,
    attribute,
    is_dequantize,
    is_fake_quantize,
    is_quantize,
)
from remora_contract.errors import Unsupported

_SCALE_WORDS = ("pre_quant", "prequant", "smooth", "awq", "input_quantizer", "channel_scale")
_FLOATS = (1, 10, 11, 16)  # of TensorProto.DataType
_WHOLE_NORMS = (
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)


def input_tap(view: GraphView, linear: Linear) -> str:
    """The activation [.., k] as the model computed it. Raises Unsupported where that is unclear."""
    value = tap = linear.x
    for _ in range(len(view.nodes)):
        node = view.producer(value)
        before = None if node is None else _before(view, node, value, linear)
        if node is None or before is None:
            break
        if node.op_type == "Cast":
            _check_cast(view, before, value)
        value = before
        if node.op_type not in SAME_ELEMENTS:
            tap = value
    return tap


def _check_cast(view: GraphView, before: str, after: str) -> None:
    """Codes that are cast to floats, their scale applied elsewhere: x is out of sight."""
    if view.dtype(after) in _FLOATS and view.dtype(before) not in (*_FLOATS, None):
        raise Unsupported(
            f"{shown(before)} is quantized in a way that is not understood: say which value the "
            "branch reads as `input` of the attach point"
        )


def _before(view: GraphView, node: Any, value: str, linear: Linear) -> str | None:
    """What `value` was before a step that only its linear layer wants; None: the step is the
    model's own."""
    if node.op_type in SAME_ELEMENTS or is_quantize(node) or is_fake_quantize(node):
        return None if view.is_constant(node.input[0]) else str(node.input[0])
    if is_dequantize(node):
        return str(node.input[0])
    if node.op_type in ("Mul", "Div"):
        return _unscaled(view, node, linear)
    if node.op_type == "Gather" and _reorders(view, node, value, linear.k):
        return str(node.input[0])
    return None


def _reorders(view: GraphView, node: Any, value: str, k: int) -> bool:
    """GPTQ with act-order: Gather(x, constant [k]) along the last axis."""
    axis, rank = attribute(node, "axis") or 0, view.rank(value)
    last = axis == -1 or (rank is not None and axis == rank - 1)
    return last and view.is_constant(node.input[1]) and view.shape(node.input[1]) == (k,)


def _unscaled(view: GraphView, node: Any, linear: Linear) -> str | None:
    """x of Mul(x, s) or Div(x, s) with a constant s of k entries that is no norm's weight."""
    x, scale = node.input[:2]
    if node.op_type == "Mul" and view.is_constant(x):
        x, scale = scale, x
    if view.is_constant(x) or not view.is_constant(scale):
        return None
    shape = view.shape(scale)
    if not shape or shape[-1] != linear.k or any(d != 1 for d in shape[:-1]):
        return None
    return x if _is_pre_scale(view, x, scale) else None


def _is_pre_scale(view: GraphView, x: str, scale: str) -> bool:
    names = [_last_words(leaf) for leaf in view.constant_leaves(scale)]
    if any(word in name for name in names for word in _SCALE_WORDS):
        return True
    if any("norm" in name for name in names):
        return False
    maker = _arithmetic_maker(view, x)
    if maker is not None and maker.op_type in _WHOLE_NORMS:
        raise Unsupported(
            f"{shown(scale)} multiplies what {maker.op_type} gives: a quantizer's scale, or the "
            "norm's own weight? Say which value the branch reads as `input` of the attach point"
        )
    return maker is None or not _normalises(view, maker)


def _last_words(name: str) -> str:
    """`q_proj.pre_quant_scale` of a path: what stands before may be anything."""
    return ".".join(re.split("[./]", name.lower())[-2:])


def _arithmetic_maker(view: GraphView, value: str) -> Any | None:
    """The node that computed `value`, casts left aside."""
    node = view.producer(value)
    while node is not None and node.op_type in ("Cast", "Identity"):
        node = view.producer(node.input[0])
    return node


def _normalises(view: GraphView, node: Any) -> bool:
    """x / sqrt(..) in one of its spellings: a decomposed norm's last step before its weight."""
    if node.op_type == "LpNormalization":
        return True
    if node.op_type == "Div":
        return not view.is_constant(node.input[1]) and _is_root(view, node.input[1])
    if node.op_type == "Mul":
        makers = [_arithmetic_maker(view, i) for i in node.input]
        return any(_inverts_root(view, m) for m in makers if m is not None)
    return False


def _inverts_root(view: GraphView, node: Any) -> bool:
    if node.op_type in ("Reciprocal", "Rsqrt"):
        return True
    if node.op_type == "Div":
        return view.is_constant(node.input[0]) and _is_root(view, node.input[1])
    return node.op_type == "Pow" and view.is_constant(node.input[1])


def _is_root(view: GraphView, value: str) -> bool:
    maker = _arithmetic_maker(view, value)
    return maker is not None and maker.op_type in ("Sqrt", "Pow", "ReduceL2", "Clip", "Max")


def output_tap(view: GraphView, linear: Linear) -> str:
    """Walks over what belongs to the layer and nobody else reads: a bias, then a quantization."""
    return _after_quantization(view, _after_bias(view, linear.y, linear.n))


def _after_bias(view: GraphView, value: str, n: int) -> str:
    reader = view.only_reader(value)
    node = None if reader is None else view.nodes[reader]
    if node is None or node.op_type != "Add":
        return value
    other = node.input[1] if node.input[0] == value else node.input[0]
    is_bias = view.is_constant(other) and view.shape(other) == (n,)
    return str(node.output[0]) if is_bias else value


def _after_quantization(view: GraphView, value: str) -> str:
    quantize = view.only_reader(value)
    if quantize is None or not is_quantize(view.nodes[quantize]):
        return value
    dequantize = view.only_reader(view.nodes[quantize].output[0])
    if dequantize is None or not is_dequantize(view.nodes[dequantize]):
        return value
    return str(view.nodes[dequantize].output[0])
