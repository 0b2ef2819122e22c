"""RotaryEmbedding of the portable graph -> inside GroupQueryAttention where its kernel can, else
com.microsoft's own operator before it.

The kernel wants whole vectors: pairs a multiple of 8, heads a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import (
    MICROSOFT,
    Editor,
    input_of,
    integer,
    no_more_inputs,
    refuse,
    tensor,
    widened,
)
from remora_agent.engine.ort.rewrite.masks import reaches
from remora_contract import targets
from remora_contract.decoder import DecoderSpec

_PAIRS, _HEAD = 8, 16


@dataclass(frozen=True)
class Rotation:
    """How queries and keys of a layer turn. `positions` is None where they are the own ones."""

    node: ir.Node  # one that does it, for its tables
    interleaved: bool
    dims: int  # leading dimensions that turn
    positions: ir.Value | None


def rotation(value: ir.Value, decoder: DecoderSpec) -> Rotation | None:
    """The rotation that makes `value`; None when there is none. Raises EngineFault."""
    rope = value.producer()
    if rope is None or rope.op_type != "RotaryEmbedding":
        return None
    no_more_inputs(rope, 4)
    positions = input_of(rope, 3)
    own = positions.is_graph_input() and positions.name == targets.POSITION_IDS
    if not own and not reaches(_counted(positions), targets.POSITION_IDS):
        refuse(rope, f"expected positions made of the input {targets.POSITION_IDS}")
    dims = integer(rope, "rotary_embedding_dim", 0) or decoder.head_dim
    if tuple(tensor(rope, 1).shape.numpy())[1] * 2 != dims:
        refuse(rope, f"expected tables of {dims // 2} pairs")
    return Rotation(rope, bool(integer(rope, "interleaved", 0)), dims, None if own else positions)


def _counted(positions: ir.Value) -> ir.Value:
    """Of positions moved to another part of the table (p + offset), p itself."""
    node = positions.producer()
    return input_of(node, 0) if node is not None and node.op_type == "Add" else positions


def same(query: Rotation | None, key: Rotation | None, of: ir.Node) -> Rotation | None:
    """The rotation of both. Raises EngineFault when they differ."""
    if query is None or key is None:
        if query is not key:
            refuse(of, "expected queries and keys both rotated or neither")
        return None
    tables = [[input_of(r.node, i) for i in (1, 2)] for r in (query, key)]
    facts = [(r.interleaved, r.dims, r.positions) for r in (query, key)]
    if tables[0] != tables[1] or facts[0] != facts[1]:
        refuse(of, "expected queries and keys rotated alike")
    return query


def fits_attention(found: Rotation, decoder: DecoderSpec) -> bool:
    return (found.dims // 2) % _PAIRS == 0 and decoder.head_dim % _HEAD == 0


def rotate(
    editor: Editor, value: ir.Value, found: Rotation, heads: int, positions: ir.Value, name: str
) -> ir.Value:
    """`value` [b, s, heads * hd], rotated by an operator of its own."""
    attributes = {"interleaved": int(found.interleaved), "num_heads": heads}
    if integer(found.node, "rotary_embedding_dim", 0):
        attributes["rotary_embedding_dim"] = found.dims
    inputs = [value, positions, table(editor, found, 1), table(editor, found, 2)]
    (turned,) = editor.emit(
        "RotaryEmbedding", inputs, name, domain=MICROSOFT, attributes=attributes
    )
    return turned


def table(editor: Editor, found: Rotation, index: int) -> ir.Value:
    """cos or sin [positions + 1, pairs]"""
    return by_position(editor, found.node, index)


def by_position(editor: Editor, node: ir.Node, index: int) -> ir.Value:
    """The table at an input, [positions, ...], in float32 with its last row again: the cache has
    one spare position."""
    source = tensor(node, index)
    name = f"{input_of(node, index).name}.padded"
    known = editor.graph.initializers.get(name)
    if known is not None:
        return known
    full = np.asarray(widened(source, name).numpy())
    return editor.initializer(np.concatenate([full, full[-1:]]), name)
