"""RotaryEmbedding + TensorScatter + Attention -> GroupQueryAttention with a shared cache.

    q, k = rotate(split(y));  cache[position] = k, v;  softmax(cap(q k' * scale) + mask) v

GroupQueryAttention does all of it on the packed y [b, s, (heads + 2 kv) * head_dim] and writes the
new keys and values into the past buffer when past and present are the same memory. Its mask is
implied, so the portable graph's mask is read before it is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort import names
from remora_agent.engine.ort.rewrite import rotary
from remora_agent.engine.ort.rewrite.edit import (
    MICROSOFT,
    Editor,
    input_of,
    integer,
    no_more_inputs,
    number,
    only_user,
    producer,
    refuse,
)
from remora_agent.engine.ort.rewrite.masks import reaches, window_of
from remora_agent.engine.ort.rewrite.operands import (
    Operand,
    check_heads_first,
    check_packing,
    operand,
)
from remora_agent.engine.ort.rewrite.rotary import Rotation, rotation
from remora_contract import targets
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import EngineFault

_HEAD_MULTIPLE = 8  # what the kernel asks of head_dim
_LAST_AXIS = np.array([-1], np.int64)


@dataclass(frozen=True)
class _Parts:
    """One attention, taken apart."""

    layer: int
    operands: tuple[Operand, Operand, Operand]  # q, k, v
    rope: Rotation | None
    query_factor: ir.Node | None  # looks up by position what queries are multiplied with
    writes: tuple[ir.Node, ir.Node]  # of keys and values into the cache


def fuse_attention(editor: Editor, decoder: DecoderSpec, window_excess: int) -> None:
    """Rewrites every Attention. `window_excess`: how many positions more than its
    `local_window_size` the runtime's kernel looks at. Raises EngineFault naming what differs."""
    if decoder.head_dim % _HEAD_MULTIPLE:
        raise EngineFault(
            f"ONNX Runtime's attention takes heads of a multiple of {_HEAD_MULTIPLE}; this model's "
            f"have {decoder.head_dim}: it cannot run on this backend"
        )
    for node in editor.nodes("Attention"):
        _fuse(editor, node, decoder, window_excess)


def _fuse(editor: Editor, node: ir.Node, decoder: DecoderSpec, window_excess: int) -> None:
    no_more_inputs(node, 4)
    if integer(node, "is_causal", 0):
        refuse(node, "is_causal is never emitted")
    parts = _take_apart(node, decoder)
    attributes = _attributes(node, parts, decoder)
    window = window_of(input_of(node, 3), node)
    if window is not None:
        if window <= window_excess:
            refuse(node, f"a window of {window} is narrower than this runtime can do")
        attributes["local_window_size"] = window - window_excess
    key_write, value_write = parts.writes
    inputs = _inputs(editor, parts, decoder)
    stem = f"layers.{parts.layer}.attention"
    out, present_key, present_value = editor.emit(
        "GroupQueryAttention",
        [
            *inputs[:3],
            input_of(key_write, 0),
            input_of(value_write, 0),
            editor.input(names.LAST_POSITION, ir.DataType.INT32, ["b"]),
            editor.input(names.TOTAL_LENGTH, ir.DataType.INT32, []),
            *inputs[3:],
        ],
        f"{stem}.fused",
        domain=MICROSOFT,
        outputs=[f"{stem}.out", f"new_key.{parts.layer}", f"new_value.{parts.layer}"],
        attributes=attributes,
    )
    editor.replace(key_write.outputs[0], present_key)
    editor.replace(value_write.outputs[0], present_value)
    _reshape_result(editor, node, parts.layer, out)


def _take_apart(node: ir.Node, decoder: DecoderSpec) -> _Parts:
    query, factor = _unscaled(input_of(node, 0))
    key_write = producer(input_of(node, 1), "TensorScatter", node)
    value_write = producer(input_of(node, 2), "TensorScatter", node)
    for write in (key_write, value_write):
        _check_write(write)
    key, value = input_of(key_write, 1), input_of(value_write, 1)
    turned = rotation(query, decoder), rotation(key, decoder)
    rope = rotary.same(*turned, node)
    before = [
        input_of(r.node, 0) if r is not None else v
        for r, v in zip((*turned, None), (query, key, value), strict=True)
    ]
    operands = (operand(before[0], node), operand(before[1], node), operand(before[2], node))
    check_packing(node, operands, decoder)
    layer = _layer(key_write, value_write)
    return _Parts(layer, operands, rope, factor, (key_write, value_write))


def _unscaled(query: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """Queries before a factor that is looked up by position, and the lookup."""
    multiply = query.producer()
    if multiply is None or multiply.op_type != "Mul":
        return query, None
    factor = input_of(multiply, 1)
    while (node := factor.producer()) is not None and node.op_type in ("Unsqueeze", "Reshape"):
        factor = input_of(node, 0)
    lookup = producer(factor, "Gather", multiply)
    if not reaches(input_of(lookup, 1), targets.POSITION_IDS):
        refuse(lookup, f"expected a lookup by {targets.POSITION_IDS}")
    return input_of(multiply, 0), lookup


def _attributes(node: ir.Node, parts: _Parts, decoder: DecoderSpec) -> dict[str, Any]:
    query, key, _ = parts.operands
    attributes: dict[str, Any] = {
        "num_heads": query.heads,
        "kv_num_heads": key.heads,
        "scale": number(node, "scale", decoder.head_dim**-0.5),
        "do_rotary": 0,
    }
    if cap := number(node, "softcap", 0.0):
        attributes["softcap"] = cap
    rope = parts.rope
    if rope is not None and rotary.fits_attention(rope, decoder):
        attributes |= {"do_rotary": 1, "rotary_interleaved": int(rope.interleaved)}
    return attributes


def _inputs(editor: Editor, parts: _Parts, decoder: DecoderSpec) -> list[ir.Value | None]:
    """query, key, value, and what the kernel rotates with: cos, sin, positions."""
    rope = parts.rope
    inside = rope is not None and rotary.fits_attention(rope, decoder)
    outside = rope if rope is not None and not inside else None
    tables: list[ir.Value | None] = []
    if rope is not None and inside:
        tables = [rotary.table(editor, rope, 1), rotary.table(editor, rope, 2)]
        tables += [rope.positions] if rope.positions is not None else []
    if all(o.plain for o in parts.operands) and outside is None and parts.query_factor is None:
        packed = _tokens(editor, parts.operands[0].packed, f"layers.{parts.layer}.attention.packed")
        return [packed, None, None, *tables]
    return [*_separate(editor, parts, outside), *tables]


def _separate(editor: Editor, parts: _Parts, rope: Rotation | None) -> list[ir.Value | None]:
    """q, k and v by themselves [b, s, heads * hd], scaled and rotated here where it must be."""
    separate: list[ir.Value | None] = []
    for part, found in zip("qkv", parts.operands, strict=True):
        stem = f"layers.{parts.layer}.attention.{part}"
        value = _tokens(editor, found.value, stem)
        if part == "q" and parts.query_factor is not None:
            value = _scaled(editor, value, parts.query_factor, stem)
        if part != "v" and rope is not None:
            positions = rope.positions or _positions(editor)
            value = rotary.rotate(editor, value, rope, found.heads, positions, f"{stem}.rotated")
        separate.append(value)
    return separate


def _scaled(editor: Editor, value: ir.Value, lookup: ir.Node, stem: str) -> ir.Value:
    """[b, s, width] times a factor for each position. Rotation is linear, so before it will do."""
    last = editor.initializer(_LAST_AXIS, "const.last_axis")
    table = rotary.by_position(editor, lookup, 0)
    (factor,) = editor.emit("Gather", [table, _positions(editor)], f"{stem}.factor")
    (column,) = editor.emit("Unsqueeze", [factor, last], f"{stem}.factor.column")
    (scaled,) = editor.emit("Mul", [value, column], f"{stem}.scaled")
    return scaled


def _tokens(editor: Editor, value: ir.Value, name: str) -> ir.Value:
    """[g, m, ...] as [b, s, width]."""
    shape = editor.input(names.BATCH_SHAPE, ir.DataType.INT64, [3])
    (tokens,) = editor.emit("Reshape", [value, shape], name)
    return tokens


def _positions(editor: Editor) -> ir.Value:
    return editor.input(targets.POSITION_IDS, ir.DataType.INT64, ["b", "s"])


def _reshape_result(editor: Editor, node: ir.Node, layer: int, out: ir.Value) -> None:
    """[b, s, heads * hd] back to rows in groups, in the place of Transpose and Reshape."""
    transpose = only_user(node.outputs[0], "Transpose", node)
    check_heads_first(transpose)
    reshape = only_user(transpose.outputs[0], "Reshape", transpose)
    group_shape = editor.input(names.GROUP_SHAPE, ir.DataType.INT64, [3])
    name = f"layers.{layer}.attention.grouped"
    (grouped,) = editor.emit("Reshape", [out, group_shape], name)
    editor.replace(reshape.outputs[0], grouped)


def _check_write(write: ir.Node) -> None:
    """TensorScatter along the tokens at position_ids[:, 0]."""
    mode = write.attributes.get("mode")
    if integer(write, "axis", -2) not in (-2, 2) or (mode and mode.as_string() != "linear"):
        refuse(write, "expected a linear write along the token axis")
    if not reaches(input_of(write, 2), targets.POSITION_IDS):
        refuse(write, f"expected its position from the input {targets.POSITION_IDS}")


def _layer(key_write: ir.Node, value_write: ir.Node) -> int:
    """Which layer's cache these two nodes write."""
    name = input_of(key_write, 0).name or ""
    stem, _, number_ = name.rpartition(".")
    layer = int(number_) if stem == "past_key" and number_.isdigit() else None
    if layer is None or input_of(value_write, 0).name != targets.past_value(layer):
        refuse(key_write, "expected past_key.{l} and past_value.{l} of one layer")
    return layer
