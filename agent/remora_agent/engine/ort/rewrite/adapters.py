"""The bank's branch -> the grouped form.

Portable:   y += ((x A) * gate) B         A [k, T], B [T, n] block-diagonal over the parts
Grouped:    y_p += (x A_p) B_p            x [g, m, k]; A [g, k, parts * r]; B_p [g, r, n_p]

One group has one mix of adapters, its weights folded into B, so there is no gate, no zero block
and no column of somebody else's adapter in a row's product.
"""

from __future__ import annotations

import re

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
from remora_contract.bundle import DecoderSpec
from remora_contract.errors import EngineFault
from remora_contract.targets import PARTS, Group

_INPUT = re.compile(r"lora_(a|b|gate)\.")
_SLOT = re.compile(r"slot_(a|b)\.")
_BANK_A = re.compile(r"lora_a\.(\d+)\.(qkv|o|gate_up|down)")
_FLOAT = ir.DataType.FLOAT


def group_adapters(editor: Editor, decoder: DecoderSpec) -> int:
    """Rewrites every branch; how many there are. Raises EngineFault when an input stays unused."""
    bank = [v for v in editor.graph.inputs if _INPUT.match(v.name or "")]
    branches = 0
    for value in bank:
        match = _BANK_A.fullmatch(value.name or "")
        if match:
            group: Group = match[2]  # type: ignore[assignment]  # the pattern lists the groups
            _rewrite(editor, value, int(match[1]), group, decoder)
            branches += 1
    for value in bank:
        editor.graph.inputs.remove(value)
    _check_complete(editor, bank, branches, decoder)
    return branches


def _rewrite(
    editor: Editor, bank_a: ir.Value, layer: int, group: Group, decoder: DecoderSpec
) -> None:
    down = _only_reader(bank_a, "MatMul", 1)
    gated = only_user(down.outputs[0], "Mul", down)
    if other_input(gated, down.outputs[0]).name != targets.lora_gate(group):
        refuse(gated, f"expected the gate {targets.lora_gate(group)}")
    up = only_user(gated.outputs[0], "MatMul", gated)
    if input_of(up, 1).name != targets.lora_b(layer, group):
        refuse(up, f"expected {targets.lora_b(layer, group)}")
    add = only_user(up.outputs[0], "Add", up)
    base = other_input(add, up.outputs[0])
    deltas = _deltas(editor, input_of(down, 0), layer, group, decoder)
    _apply(editor, add, base, layer, group, deltas)


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
    editor: Editor, bank: list[ir.Value], branches: int, decoder: DecoderSpec
) -> None:
    """All layers and groups have a branch, or none has. A dropped adapter must not pass."""
    needed = sum(len(decoder.groups(layer)) for layer in range(decoder.layers))
    if bank and branches != needed:
        raise EngineFault(
            f"the graph has {branches} adapter branches, not {needed}: "
            "an adapter would be applied in part; export the bundle again"
        )
    expected: set[str] = set()
    for layer in range(decoder.layers if bank else 0):
        expected |= {names.slot_a(layer, group) for group in decoder.groups(layer)}
        expected |= {names.slot_b(layer, p) for p in decoder.projections(layer)}
    found = {v.name or "" for v in editor.graph.inputs if _SLOT.match(v.name or "")}
    if found != expected:
        odd = sorted(found ^ expected)[0]
        raise EngineFault(f"adapter input {odd!r} stays unbound after the rewrite")
