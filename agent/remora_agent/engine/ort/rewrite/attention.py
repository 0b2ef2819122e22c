"""RotaryEmbedding + TensorScatter + Attention -> GroupQueryAttention with a shared cache.

    q, k = rotate(split(y));  cache[position] = k, v;  softmax(q k' * scale + mask) v

GroupQueryAttention does all of it on the packed y [b, s, (heads + 2 kv) * head_dim] and writes the
new keys and values into the past buffer when past and present are the same memory. Its causal
mask is implied, so the portable graph's mask is checked before it is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort import names
from remora_agent.engine.ort.rewrite.edit import (
    MICROSOFT,
    Editor,
    constant,
    input_of,
    integer,
    no_more_inputs,
    number,
    only_user,
    producer,
    refuse,
    tensor,
    widened,
)
from remora_contract import targets
from remora_contract.bundle import DecoderSpec

_HEADS_FIRST = [0, 2, 1, 3]  # [b, s, heads, hd] <-> [b, heads, s, hd]


@dataclass(frozen=True)
class _Heads:
    """A [tokens, heads, head_dim] tensor on its way from the packed projection."""

    source: ir.Value  # packed y
    begin: int
    end: int
    count: int
    normed: ir.Value | None  # [.., heads, head_dim] after q/k norm


def fuse_attention(editor: Editor, decoder: DecoderSpec) -> None:
    """Rewrites every Attention. Raises EngineFault naming what differs."""
    nodes = editor.nodes("Attention")
    masks = {input_of(node, 3) for node in nodes}
    for mask in masks:
        _check_causal(mask, nodes[0])
    for node in nodes:
        _fuse(editor, node, decoder)


def _fuse(editor: Editor, node: ir.Node, decoder: DecoderSpec) -> None:
    no_more_inputs(node, 4)
    if integer(node, "is_causal", 0) or number(node, "softcap", 0.0):
        refuse(node, "is_causal and softcap are never emitted")
    query_rope = producer(input_of(node, 0), "RotaryEmbedding", node)
    key_write = producer(input_of(node, 1), "TensorScatter", node)
    value_write = producer(input_of(node, 2), "TensorScatter", node)
    key_rope = producer(input_of(key_write, 1), "RotaryEmbedding", key_write)
    for rope in (query_rope, key_rope):
        _check_rope(rope)
    for write in (key_write, value_write):
        _check_write(write)
    query = _heads(input_of(query_rope, 0), query_rope)
    key = _heads(input_of(key_rope, 0), key_rope)
    value = _heads(input_of(value_write, 1), value_write)
    _check_packing(node, (query, key, value), decoder)
    layer = _layer(key_write, value_write)
    out, present_key, present_value = editor.emit(
        "GroupQueryAttention",
        [
            *_attention_inputs(editor, node, layer, (query, key, value)),
            input_of(key_write, 0),
            input_of(value_write, 0),
            editor.input(names.LAST_POSITION, ir.DataType.INT32, ["b"]),
            editor.input(names.TOTAL_LENGTH, ir.DataType.INT32, []),
            _rotary_table(editor, query_rope, 1),
            _rotary_table(editor, query_rope, 2),
        ],
        f"layers.{layer}.attention.fused",
        domain=MICROSOFT,
        outputs=[f"layers.{layer}.attention.out", f"new_key.{layer}", f"new_value.{layer}"],
        attributes={
            "num_heads": query.count,
            "kv_num_heads": key.count,
            "scale": number(node, "scale", decoder.head_dim**-0.5),
            "do_rotary": 1,
            "rotary_interleaved": 0,
        },
    )
    editor.replace(key_write.outputs[0], present_key)
    editor.replace(value_write.outputs[0], present_value)
    _reshape_result(editor, node, layer, out)


def _attention_inputs(
    editor: Editor, node: ir.Node, layer: int, heads: tuple[_Heads, _Heads, _Heads]
) -> list[ir.Value | None]:
    """Packed y when nothing touches its parts in between; else q, k and v by themselves."""
    batch_shape = editor.input(names.BATCH_SHAPE, ir.DataType.INT64, [3])
    stem = f"layers.{layer}.attention"
    if all(h.normed is None for h in heads):
        (packed,) = editor.emit("Reshape", [heads[0].source, batch_shape], f"{stem}.packed")
        return [packed, None, None]
    parts: list[ir.Value | None] = []
    for part, h in zip("qkv", heads, strict=True):
        value = h.normed if h.normed is not None else _slice_of(h)
        parts += editor.emit("Reshape", [value, batch_shape], f"{stem}.{part}")
    return parts


def _slice_of(heads: _Heads) -> ir.Value:
    for user in heads.source.consumers():
        if user.op_type == "Slice" and int(constant(user, 1)[0]) == heads.begin:
            return user.outputs[0]
    raise AssertionError("the slice was found before")


def _reshape_result(editor: Editor, node: ir.Node, layer: int, out: ir.Value) -> None:
    """[b, s, heads * hd] back to rows in groups, in the place of Transpose and Reshape."""
    transpose = only_user(node.outputs[0], "Transpose", node)
    _check_transpose(transpose)
    reshape = only_user(transpose.outputs[0], "Reshape", transpose)
    group_shape = editor.input(names.GROUP_SHAPE, ir.DataType.INT64, [3])
    name = f"layers.{layer}.attention.grouped"
    (grouped,) = editor.emit("Reshape", [out, group_shape], name)
    editor.replace(reshape.outputs[0], grouped)


def _heads(value: ir.Value, of: ir.Node) -> _Heads:
    """Follows Transpose <- [norm] <- Reshape <- Slice back to the packed projection."""
    transpose = producer(value, "Transpose", of)
    _check_transpose(transpose)
    before, normed = input_of(transpose, 0), None
    maker = before.producer()
    if maker is not None and maker.op_type == "RMSNormalization":
        before, normed = input_of(maker, 0), before
    reshape = producer(before, "Reshape", transpose)
    shape = constant(reshape, 1)
    if len(shape) != 4 or list(shape[:2]) != [0, 0]:
        refuse(reshape, "expected a shape [0, 0, heads, head_dim]")
    cut = producer(input_of(reshape, 0), "Slice", reshape)
    begin, end = slice_bounds(cut)
    return _Heads(input_of(cut, 0), begin, end, int(shape[2]), normed)


def slice_bounds(cut: ir.Node) -> tuple[int, int]:
    """Columns begin..end of a Slice along the last axis. Raises EngineFault on any other."""
    begin, end, axis = (constant(cut, i) for i in (1, 2, 3))
    step = constant(cut, 4) if len(cut.inputs) > 4 and cut.inputs[4] is not None else np.ones(1)
    if not len(begin) == len(end) == len(axis) == 1 or int(axis[0]) not in (2, -1) or step[0] != 1:
        refuse(cut, "expected a slice of the last of three axes")
    return int(begin[0]), int(end[0])


def _check_packing(node: ir.Node, heads: tuple[_Heads, ...], decoder: DecoderSpec) -> None:
    """q, k, v lie side by side in this order, with the decoder's head counts."""
    at = 0
    for h, count in zip(heads, (decoder.heads, decoder.kv_heads, decoder.kv_heads), strict=True):
        width = count * decoder.head_dim
        if h.count != count or (h.begin, h.end) != (at, at + width):
            refuse(node, f"expected q, k, v packed as {count} heads at column {at}")
        at += width
    if len({h.source for h in heads}) != 1:
        refuse(node, "expected q, k and v from one packed projection")


def _check_rope(rope: ir.Node) -> None:
    no_more_inputs(rope, 4)
    if integer(rope, "interleaved", 0) or integer(rope, "rotary_embedding_dim", 0):
        refuse(rope, "expected rotation of whole heads by halves")
    if input_of(rope, 3).name != targets.POSITION_IDS:
        refuse(rope, f"expected positions from the input {targets.POSITION_IDS}")


def _check_write(write: ir.Node) -> None:
    """TensorScatter along the tokens at position_ids[:, 0]."""
    mode = write.attributes.get("mode")
    if integer(write, "axis", -2) not in (-2, 2) or (mode and mode.as_string() != "linear"):
        refuse(write, "expected a linear write along the token axis")
    if not _reaches(input_of(write, 2), targets.POSITION_IDS):
        refuse(write, f"expected its position from the input {targets.POSITION_IDS}")


def _check_transpose(transpose: ir.Node) -> None:
    if list(transpose.attributes["perm"].as_ints()) != _HEADS_FIRST:
        refuse(transpose, f"expected perm {_HEADS_FIRST}")


def _check_causal(mask: ir.Value, of: ir.Node) -> None:
    """Where(kpos <= position, 0, -inf): exactly what GroupQueryAttention implies."""
    where = producer(mask, "Where", of)
    comparison = producer(input_of(where, 0), "LessOrEqual", where)
    key_positions = constant(comparison, 0).reshape(-1)
    allowed, forbidden = constant(where, 1), constant(where, 2)
    if (
        not np.array_equal(key_positions, np.arange(len(key_positions)))
        or not _reaches(input_of(comparison, 1), targets.POSITION_IDS)
        or np.any(allowed != 0)
        or not np.all(np.isneginf(forbidden))
    ):
        refuse(where, "expected the causal mask Where(kpos <= position, 0, -inf)")


def _reaches(value: ir.Value, graph_input: str) -> bool:
    """Does `value` come from the graph input through at most a few shape operators?"""
    for _ in range(6):
        node = value.producer()
        if node is None:
            return value.is_graph_input() and value.name == graph_input
        if node.op_type not in ("Slice", "Squeeze", "Unsqueeze", "Gather", "Reshape"):
            return False
        value = input_of(node, 0)
    return False


def _layer(key_write: ir.Node, value_write: ir.Node) -> int:
    """Which layer's cache these two nodes write."""
    name = input_of(key_write, 0).name or ""
    stem, _, number_ = name.rpartition(".")
    layer = int(number_) if stem == "past_key" and number_.isdigit() else None
    if layer is None or input_of(value_write, 0).name != targets.past_value(layer):
        refuse(key_write, "expected past_key.{l} and past_value.{l} of one layer")
    return layer


def _rotary_table(editor: Editor, rope: ir.Node, index: int) -> ir.Value:
    """cos or sin [C + 1, hd / 2] in float32: the last row again, for the spare cache position."""
    table = tensor(rope, index)
    name = f"{input_of(rope, index).name}.padded"
    known = editor.graph.initializers.get(name)
    if known is not None:
        return known
    full = np.asarray(widened(table, name).numpy())
    return editor.initializer(np.concatenate([full, full[-1:]]), name)
