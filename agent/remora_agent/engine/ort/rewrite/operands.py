"""What goes into an Attention, followed back to the packed projection it was cut from.

Owns the shapes on the way: [.., heads * hd] -> heads -> [b, heads, s, hd]. Everything between the
cut and the transpose works on the last axes alone, so it means the same for tokens in groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort.rewrite.edit import constant, input_of, producer, refuse
from remora_contract.decoder import DecoderSpec

HEADS_FIRST = [0, 2, 1, 3]  # [b, s, heads, hd] <-> [b, heads, s, hd]
# What a family may do to a projection before attention: norms and factors over the last axes.
_BETWEEN = {"RMSNormalization", "LayerNormalization", "Mul", "Add"}


@dataclass(frozen=True)
class Operand:
    """q, k or v: `value` [g, m, heads, hd] or [g, m, heads * hd], not yet heads first."""

    value: ir.Value
    packed: ir.Value  # what it was cut from
    begin: int  # its columns in `packed`
    end: int
    heads: int
    plain: bool  # nothing lies between the cut and here


def operand(value: ir.Value, of: ir.Node) -> Operand:
    """Follows Transpose <- [norms] <- Reshape <- [norms] <- Slice. Raises EngineFault."""
    transpose = producer(value, "Transpose", of)
    check_heads_first(transpose)
    made = input_of(transpose, 0)
    before, touched = _skip(made)
    reshape = producer(before, "Reshape", transpose)
    shape = constant(reshape, 1)
    if len(shape) != 4 or list(shape[:2]) != [0, 0]:
        refuse(reshape, "expected a shape [0, 0, heads, head_dim]")
    flat, also_touched = _skip(input_of(reshape, 0))
    cut = producer(flat, "Slice", reshape)
    begin, end = slice_bounds(cut)
    plain = not touched and not also_touched
    shown = flat if plain else made
    return Operand(shown, input_of(cut, 0), begin, end, int(shape[2]), plain)


def _skip(value: ir.Value) -> tuple[ir.Value, bool]:
    """Back over norms and factors; was there any?"""
    touched = False
    while (node := value.producer()) is not None and node.op_type in _BETWEEN:
        if not all(v is None or v.is_initializer() for v in node.inputs[1:]):
            break
        value, touched = input_of(node, 0), True
    return value, touched


def check_heads_first(transpose: ir.Node) -> None:
    if list(transpose.attributes["perm"].as_ints()) != HEADS_FIRST:
        refuse(transpose, f"expected perm {HEADS_FIRST}")


def check_packing(node: ir.Node, operands: tuple[Operand, ...], decoder: DecoderSpec) -> None:
    """q, k, v lie side by side in this order, with the decoder's head counts."""
    at = 0
    counts = (decoder.heads, decoder.kv_heads, decoder.kv_heads)
    for found, count in zip(operands, counts, strict=True):
        width = count * decoder.head_dim
        if found.heads != count or (found.begin, found.end) != (at, at + width):
            refuse(node, f"expected q, k, v packed as {count} heads at column {at}")
        at += width
    if len({found.packed for found in operands}) != 1:
        refuse(node, "expected q, k and v from one packed projection")


def slice_bounds(cut: ir.Node) -> tuple[int, int]:
    """Columns begin..end of a Slice along the last axis. Raises EngineFault on any other."""
    begin, end, axis = (constant(cut, i) for i in (1, 2, 3))
    step = constant(cut, 4) if len(cut.inputs) > 4 and cut.inputs[4] is not None else np.ones(1)
    if not len(begin) == len(end) == len(axis) == 1 or int(axis[0]) not in (2, -1) or step[0] != 1:
        refuse(cut, "expected a slice of the last of three axes")
    return int(begin[0]), int(end[0])
