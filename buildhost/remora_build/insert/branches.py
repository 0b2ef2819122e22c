"""Attach points made concrete: each branch's values, shapes, types and input names. Pure.

    y = y + ((x A) * gate) B      x [rows, s, k]   A [k, T]   B [T, n]   gate [rows or 1, 1, T]

`rows` is what the first axis of x counts: the sequences of a batch, or single tokens where the
graph has no batch axis ([tokens, k] and [tokens, 1, k]). All points of one slot share a gate and a
T, whatever their layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from remora_build.insert.attach import AttachPlan, AttachPoint, Part
from remora_build.insert.mapping import NodeNames
from remora_build.insert.patterns import Linear
from remora_build.insert.shown import shown
from remora_build.insert.taps import input_tap, output_tap
from remora_build.insert.view import SAME_ELEMENTS, GraphView
from remora_contract.errors import InvalidInput, Unsupported

Dtype = Literal["float16", "bfloat16", "float32"]
DTYPES: dict[int, Dtype] = {1: "float32", 10: "float16", 16: "bfloat16"}
Rows = Literal["batch", "tokens"]
# To the shape of what the projection reads; [rows, ..] to [rows, s, k]; [m, k] to [m, 1, k].
Reshape = Literal["like", "rows", "tokens"]


@dataclass(frozen=True)
class Gate:
    """The input [rows or 1, 1, T] that all branches of a slot share."""

    slot: str
    dtype: Dtype
    rows: Rows

    @property
    def name(self) -> str:
        return f"lora_gate.{self.slot}"

    @property
    def columns(self) -> str:
        """The symbolic dimension T."""
        return f"t_{self.slot}"

    @property
    def onnx_dtype(self) -> int:
        return next(number for number, name in DTYPES.items() if name == self.dtype)


@dataclass(frozen=True)
class Branch:
    """`input` is what A multiplies, `output` the value that the branch is added to, made by node
    number `maker`. `reshape` brings what is read to [rows, s, k]; `flat`: y is [rows * s, n]."""

    layer: int
    node: str
    parts: tuple[Part, ...]
    input: str
    output: str
    maker: int
    k: int
    gate: Gate
    read_by_node: str
    result_dtype: int
    reshape: Reshape | None = None
    flat: bool = False

    @property
    def slot(self) -> str:
        return self.gate.slot

    @property
    def rows(self) -> Rows:
        return self.gate.rows

    @property
    def n(self) -> int:
        return sum(p.n for p in self.parts)

    @property
    def at(self) -> str:
        return f"layers.{self.layer}.{self.slot}"

    @property
    def a(self) -> str:
        return f"lora_a.{self.layer}.{self.slot}"

    @property
    def b(self) -> str:
        return f"lora_b.{self.layer}.{self.slot}"


def resolve(
    view: GraphView, linears: Sequence[Linear], plan: AttachPlan
) -> tuple[tuple[Gate, ...], tuple[Branch, ...]]:
    """Raises InvalidInput when a point fits no node, Unsupported when no branch can be added."""
    names, by_node = NodeNames(view), {li.node: li for li in linears}
    branches = [_branch(view, names, by_node, point) for point in plan.points]
    gates = {b.slot: b.gate for b in branches}
    for branch in branches:
        if branch.gate != gates[branch.slot]:
            raise Unsupported(
                f"{branch.slot} has activations of several kinds: {shown(branch.node)} has "
                f"{branch.gate.dtype}, rows {branch.gate.rows}; another layer "
                f"{gates[branch.slot].dtype}, rows {gates[branch.slot].rows}"
            )
    _check_apart(branches)
    return tuple(gates.values()), tuple(branches)


def _check_apart(branches: Sequence[Branch]) -> None:
    taken: dict[int, Branch] = {}
    for branch in branches:
        if (other := taken.setdefault(branch.maker, branch)) is not branch:
            raise InvalidInput(
                f"{other.at} and {branch.at} would both be added to {shown(branch.output)}"
            )


def _branch(
    view: GraphView, names: NodeNames, by_node: Mapping[int, Linear], point: AttachPoint
) -> Branch:
    number = names.find(point.node)
    if number is None:
        raise InvalidInput(f"{_at(point)}: the model has no node {shown(point.node)}")
    linear = by_node.get(number)
    if linear is None:
        op = view.nodes[number].op_type
        raise InvalidInput(f"{_at(point)}: node {shown(point.node)} ({op}) is no linear layer")
    if linear.refusal is not None:
        raise Unsupported(f"{_at(point)}: node {shown(point.node)}: {linear.refusal}")
    if linear.n != point.n:
        raise InvalidInput(
            f"{_at(point)}: node {shown(point.node)} has {linear.n} columns, its parts have "
            f"{point.n}"
        )
    output = point.output if point.output is not None else output_tap(view, linear)
    source = _checked_input(view, point, linear, output)
    _check_output(view, point, linear, output)
    return _placed(view, point, linear, source, output)


def _checked_input(view: GraphView, point: AttachPoint, linear: Linear, output: str) -> str:
    """The value to read, once it is sure to be there before `output` is made."""
    source = point.input if point.input is not None else input_tap(view, linear)
    maker, at = view.maker(output), _at(point)
    if maker is None:
        raise InvalidInput(f"{at}: no node makes the output {shown(output)}")
    if maker < linear.node:
        raise InvalidInput(f"{at}: {shown(output)} is made before the projection itself")
    made = view.maker(source)
    if made is None and source not in view.inputs:
        raise InvalidInput(f"{at}: the model has no value {shown(source)}")
    if made is not None and made >= maker:
        raise InvalidInput(f"{at}: {shown(source)} is not made before {shown(output)}")
    return source


def _check_output(view: GraphView, point: AttachPoint, linear: Linear, output: str) -> None:
    """The value to add to has the projection's axes and the point's columns."""
    shape, rank = view.shape(output), view.rank(linear.x)
    if shape is None or rank is None:
        return
    if len(shape) != rank or (_is_int(shape[-1]) and shape[-1] != point.n):
        raise InvalidInput(
            f"{_at(point)}: {shown(output)} is {list(shape)}; {rank} axes and {point.n} columns "
            "are needed"
        )


def _placed(
    view: GraphView, point: AttachPoint, linear: Linear, source: str, output: str
) -> Branch:
    """Brings the axes in order: rows first, k last, whatever the projection itself reads."""
    at = _at(point)
    rank = _checked_rank(view, linear, at)
    rows: Rows = "batch"
    reshape: Reshape | None = None
    if rank == 3:
        reshape = None if _is_grouped(view, source, linear.k) else "like"
        rows = "tokens" if (view.shape(linear.x) or ())[1:2] == (1,) else "batch"
    elif (grouped := _grouped(view, source)) is not None:
        source = grouped
        reshape = None if _is_grouped(view, source, linear.k) else "rows"
    else:
        rows, reshape = "tokens", "tokens"
    _check_batch_first(view, linear.x, at)
    gate = Gate(point.slot, _float_dtype(view, source, linear, at), rows)
    return Branch(
        layer=point.layer,
        node=point.node,
        parts=point.parts,
        input=source,
        output=output,
        maker=view.maker(output) or 0,
        k=linear.k,
        gate=gate,
        read_by_node=linear.x,
        result_dtype=view.dtype(output) or gate.onnx_dtype,
        reshape=reshape,
        flat=rank == 2,
    )


def _checked_rank(view: GraphView, linear: Linear, at: str) -> int:
    shape = view.shape(linear.x)
    if shape is None:
        raise Unsupported(
            f"{at}: how many axes {shown(linear.x)} has is unknown; add shapes to the model "
            "(onnxruntime.tools.symbolic_shape_infer)"
        )
    if len(shape) not in (2, 3):
        raise Unsupported(f"{at}: {shown(linear.x)} has {len(shape)} axes; 2 or 3 are understood")
    if isinstance(shape[-1], int) and shape[-1] != linear.k:
        raise InvalidInput(
            f"{at}: {shown(linear.x)} is {shape[-1]} wide, its weight has {linear.k} rows"
        )
    return len(shape)


def _is_grouped(view: GraphView, value: str, k: int) -> bool:
    """Whether its axes are [rows, s, k]."""
    shape = view.shape(value)
    return shape is not None and len(shape) == 3 and (shape[-1] == k or not _is_int(shape[-1]))


def _is_int(dim: object) -> bool:
    return isinstance(dim, int)


def _grouped(view: GraphView, value: str) -> str | None:
    """What a [rows * s, k] was reshaped from: the nearest value with more axes."""
    for _ in range(len(view.nodes)):
        if (view.rank(value) or 0) > 2:
            return value
        node = view.producer(value)
        if node is None or node.op_type not in SAME_ELEMENTS:
            return None
        value = node.input[0]
    return None


def _check_batch_first(view: GraphView, value: str, at: str) -> None:
    """An activation whose axes are those of input_ids the other way round: a gate of rows would
    select positions."""
    shape, tokens = view.shape(value), view.shape("input_ids")
    if not shape or not tokens or len(shape) != 3 or len(tokens) != 2:
        return
    if all(isinstance(d, str) for d in tokens) and shape[:2] == tokens[::-1] != tokens:
        raise Unsupported(f"{at}: {shown(value)} has positions before rows, {list(shape)}")


def _float_dtype(view: GraphView, value: str, linear: Linear, at: str) -> Dtype:
    number = view.dtype(value)
    if number is None and value == linear.x:
        number = view.dtype(linear.weight)  # MatMul's operands are of one type
    if number not in DTYPES:
        known = "unknown" if number is None else f"number {number} of TensorProto"
        raise Unsupported(
            f"{at}: the type of {shown(value)} is {known}; a branch needs "
            f"{', '.join(DTYPES.values())}: name the value it reads as `input` of the attach point"
        )
    return DTYPES[number]


def _at(point: AttachPoint) -> str:
    return f"layers.{point.layer}.{point.slot}"


def resolved_plan(plan: AttachPlan, branches: Sequence[Branch]) -> AttachPlan:
    """The plan with every value that was found written out."""
    points = (
        replace(point, input=branch.input, output=branch.output)
        for point, branch in zip(plan.points, branches, strict=True)
    )
    return replace(plan, points=tuple(points))
