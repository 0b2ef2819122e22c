"""The bank's branch -> the grouped form.

Portable:   y += ((x A) * gate) B         A [k, T], B [T, n] block-diagonal over the parts
Grouped:    y_p += (x A_p) B_p            x [g, m, k]; A [g, k, parts * r]; B_p [g, r, n_p]

One group has one mix of adapters, its weights folded into B, so there is no gate, no zero block
and no column of somebody else's adapter in a row's product. DoRA's factors and adapters' biases
become inputs [g, 1, n]. What adapters add to the embedding is one input: it is looked up where the
tokens are known, outside.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx_ir as ir

from remora_agent.engine.ort import names
from remora_agent.engine.ort.rewrite.edit import (
    Editor,
    constant,
    input_of,
    only_user,
    other_input,
    refuse,
)
from remora_contract import targets
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import EngineFault
from remora_contract.targets import ALL_GROUPS, EXPERT_GROUPS, PARTS, Group, Projection

_INPUT = re.compile(r"lora_(a|b|gate|scale|bias)\.")
_OF_GROUP = re.compile(r"lora_(a|scale|bias)\.(?:(\d+)\.)?([a-z_]+)")
_FLOAT = ir.DataType.FLOAT


def group_adapters(editor: Editor, decoder: DecoderSpec) -> int:
    """Rewrites every branch; how many there are. Raises EngineFault when an input stays unused."""
    bank = [v for v in editor.graph.inputs if _INPUT.match(v.name or "")]
    branches: set[tuple[int, Group]] = set()
    for value in bank:
        match = _OF_GROUP.fullmatch(value.name or "")
        if match is None:
            continue
        layer, group = int(match[2] or 0), _group(value, match[3])
        if group in EXPERT_GROUPS:
            branches.add((layer, group))
        elif match[1] == "scale":
            _revalue(
                editor, value, "Mul", names.slot_scale(layer, group), names.rescaled(layer, group)
            )
        elif match[1] == "bias":
            _revalue(
                editor, value, "Add", names.slot_bias(layer, group), names.rebiased(layer, group)
            )
        elif group == "embed":
            _rewrite_embedding(editor, value, decoder)
            branches.add((layer, group))
        else:
            _rewrite(editor, value, layer, group, decoder)
            branches.add((layer, group))
    _check_complete(bank, branches, decoder)
    for value in bank:
        if not _keep_expert(value):
            editor.graph.inputs.remove(value)
    return len(branches)


def _keep_expert(value: ir.Value) -> bool:
    """An expert's branch stays as it is, inside the loop, under the slots' names; was it one?"""
    stem, _, place = (value.name or "").partition(".")
    if place.rpartition(".")[2] not in EXPERT_GROUPS or stem not in (
        "lora_a",
        "lora_b",
        "lora_gate",
    ):
        return False
    value.name = f"{stem.replace('lora', 'slot')}.{place}"
    return True


def _group(value: ir.Value, name: str) -> Group:
    for group in ALL_GROUPS:
        if group == name:
            return group
    raise EngineFault(f"graph input {value.name!r} names no group of projections")


def _revalue(editor: Editor, value: ir.Value, op_type: str, slot: str, node_name: str) -> None:
    """A vector [b, 1, n] of rows -> one [g, 1, n] of groups."""
    node = _only_reader(value, op_type, 1)
    shape = value.shape
    if shape is None or len(shape) != 3:
        refuse(node, "expected a vector [b, 1, n]")
    node.replace_input_with(1, editor.input(slot, _FLOAT, ["g", 1, _size(node, shape[2])]))
    node.name = node_name


def _size(node: ir.Node, size: object) -> int:
    if not isinstance(size, int):
        refuse(node, "expected a vector of known width")
    return size


def _rewrite_embedding(editor: Editor, bank_a: ir.Value, decoder: DecoderSpec) -> None:
    looked_up = _only_reader(bank_a, "Gather", 0)
    if input_of(looked_up, 1).name != targets.INPUT_IDS:
        refuse(looked_up, f"expected a lookup of {targets.INPUT_IDS}")
    add, factor = _branch_end(looked_up, 0, "embed")
    if factor is not None:
        refuse(add, "expected no factor of an embedding's branch")
    base = other_input(add, input_of(add, 1))
    delta = editor.input(names.SLOT_EMBED, _FLOAT, ["g", "m", decoder.hidden])
    (result,) = editor.emit("Add", [base, delta], names.adapted(0, "embed"))
    editor.replace(add.outputs[0], result)


def _branch_end(
    down: ir.Node, layer: int, group: Group
) -> tuple[ir.Node, ir.TensorProtocol | None]:
    """From the product with A to the Add that brings the branch in; what its answer is multiplied
    by before."""
    gated = only_user(down.outputs[0], "Mul", down)
    if other_input(gated, down.outputs[0]).name != targets.lora_gate(group):
        refuse(gated, f"expected the gate {targets.lora_gate(group)}")
    up = only_user(gated.outputs[0], "MatMul", gated)
    if input_of(up, 1).name != targets.lora_b(layer, group):
        refuse(up, f"expected {targets.lora_b(layer, group)}")
    answer, factor = _answer(up)
    return only_user(answer, "Add", up), factor


def _rewrite(
    editor: Editor, bank_a: ir.Value, layer: int, group: Group, decoder: DecoderSpec
) -> None:
    down = _only_reader(bank_a, "MatMul", 1)
    add, factor = _branch_end(down, layer, group)
    base = input_of(add, 0)
    deltas = _deltas(editor, input_of(down, 0), layer, group, decoder)
    if factor is not None:
        deltas = _scaled(editor, deltas, factor, f"layers.{layer}.{group}", decoder, PARTS[group])
    _apply(editor, add, base, layer, group, deltas)


def _answer(up: ir.Node) -> tuple[ir.Value, ir.TensorProtocol | None]:
    """What the branch adds, and the vector [n] that multiplies it where the base's outputs bear a
    folded scale (docs/quantization.md). Raises EngineFault."""
    users = [use.node for use in up.outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "Mul":
        return up.outputs[0], None
    factor = other_input(users[0], up.outputs[0])
    if not factor.is_initializer() or factor.const_value is None:
        refuse(users[0], "expected a constant vector")
    return users[0].outputs[0], factor.const_value


def _scaled(
    editor: Editor,
    deltas: list[ir.Value],
    factor: ir.TensorProtocol,
    stem: str,
    decoder: DecoderSpec,
    parts: tuple[Projection, ...],
) -> list[ir.Value]:
    """Each part's delta times its own outputs' factors."""
    vector, begin = np.asarray(factor.numpy()).astype(np.float32), 0
    scaled: list[ir.Value] = []
    for projection, delta in zip(parts, deltas, strict=True):
        end = begin + decoder.out_features(projection)
        name = f"{stem}.adapter.factor.{projection}"
        own = editor.initializer(vector[begin:end], name)
        scaled += editor.emit("Mul", [delta, own], f"{name}.applied")
        begin = end
    return scaled


def _deltas(
    editor: Editor,
    x: ir.Value,
    layer: int,
    group: Group,
    decoder: DecoderSpec,
) -> list[ir.Value]:
    """(x A_p) B_p for each part of the group."""
    parts = PARTS[group]
    stem = f"layers.{layer}.{group}.adapter"
    k = decoder.in_features(parts[0])
    a = editor.input(names.slot_a(layer, group), _FLOAT, ["g", k, f"columns.{layer}.{group}"])
    (low,) = editor.emit("MatMul", [x, a], f"{stem}.low")
    lows: tuple[ir.Value, ...] = (low,)
    if len(parts) > 1:
        lows = editor.emit(
            "Split",
            [low],
            f"{stem}.parts",
            outputs=[f"{stem}.low.{p}" for p in parts],
            attributes={"axis": -1, "num_outputs": len(parts)},
        )
    deltas: list[ir.Value] = []
    for projection, value in zip(parts, lows, strict=True):
        n, rank = decoder.out_features(projection), f"rank.{layer}.{group}"
        b = editor.input(names.slot_b(layer, projection), _FLOAT, ["g", rank, n])
        deltas += editor.emit("MatMul", [value, b], f"{stem}.{projection}")
    return deltas


def _apply(
    editor: Editor,
    add: ir.Node,
    base: ir.Value,
    layer: int,
    group: Group,
    deltas: list[ir.Value],
) -> None:
    """After the split into parts where there is one, else on the packed value."""
    parts = PARTS[group]
    split = _split_user(add.outputs[0], len(parts))
    if split is not None:
        split.replace_input_with(0, base)
        for projection, part, delta in zip(parts, tuple(split.outputs), deltas, strict=True):
            _add_part(editor, part, delta, names.adapted(layer, projection))
        return
    delta = deltas[0]
    if len(deltas) > 1:
        name = f"layers.{layer}.{group}.adapter"
        (delta,) = editor.emit("Concat", deltas, name, attributes={"axis": -1})
    (result,) = editor.emit("Add", [base, delta], names.adapted(layer, parts[0]))
    editor.replace(add.outputs[0], result)


def _add_part(editor: Editor, part: ir.Value, delta: ir.Value, name: str) -> None:
    users = tuple(part.uses())
    (result,) = editor.emit("Add", [part, delta], name)
    for user, index in users:
        user.replace_input_with(index, result)


def _split_user(value: ir.Value, parts: int) -> ir.Node | None:
    users = [use.node for use in value.uses()]
    if len(users) == 1 and users[0].op_type == "Split" and len(users[0].outputs) == parts > 1:
        constant(users[0], 1)
        return users[0]
    return None


def _only_reader(value: ir.Value, op_type: str, index: int) -> ir.Node:
    uses = tuple(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != op_type or uses[0].idx != index:
        raise EngineFault(
            f"graph input {value.name!r} must be read once, as input {index} of a {op_type}; "
            "export the bundle with a matching version of remora-build"
        )
    return uses[0].node


def _check_complete(
    bank: list[ir.Value], branches: set[tuple[int, Group]], decoder: DecoderSpec
) -> None:
    """All layers have a branch in each group, or none has; every A has its B. A dropped adapter
    must not pass."""
    stems = Counter((v.name or "").partition(".")[0] for v in bank)
    if stems["lora_a"] != len(branches) or stems["lora_b"] != len(branches):
        raise EngineFault(
            f"the graph has {stems['lora_a']} inputs A and {stems['lora_b']} B for {len(branches)} "
            "adapter branches; export the bundle again"
        )
    experts = any(group in EXPERT_GROUPS for _, group in branches)
    needed = {
        (layer, group)
        for layer in range(decoder.layers)
        for group in decoder.groups(layer)
        if experts or group not in EXPERT_GROUPS
    }
    missing = needed - branches
    if bank and missing:
        layer, group = min(missing)
        raise EngineFault(
            f"the graph has {len(branches)} adapter branches, none of them for {group} of layer "
            f"{layer}: an adapter would be applied in part; export the bundle again"
        )
