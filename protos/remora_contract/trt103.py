"""What TensorRT 10.3's ONNX parser takes, as a table, and whether a graph keeps to it. Pure.

From onnx-tensorrt's docs/operators.md of release 10.1 and docs/Changelog.md: 10.2 and 10.3 took
nothing away. Rows are the operators a decoder may need; what is not here is refused until somebody
looks it up. The parser reads opset 21 too: it has INT4 with blocks, which ONNX has only there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

OPSETS = range(9, 21)
INT4_OPSET = 21
MAX_IR_VERSION = 10
MAX_TOPK = 3840

_FLOAT = frozenset({"FLOAT", "FLOAT16", "BFLOAT16"})
_NUMBER = _FLOAT | {"INT32", "INT64"}
_ANY = _NUMBER | {"BOOL"}
_BOOL = frozenset({"BOOL"})
_QUANTIZED = frozenset({"INT8", "INT4", "FLOAT8E4M3FN"})


@dataclass(frozen=True)
class Rule:
    """How an operator may be used."""

    types: frozenset[str]  # of the inputs at `data`
    data: tuple[int, ...] = (0,)
    constant: tuple[int, ...] = ()  # inputs that must be initializers
    inputs: int | None = None  # at most
    outputs: int | None = None  # at most
    attributes: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)  # allowed values
    note: str = ""  # what fits no column, as `_against_more` checks it


_REDUCTION = Rule(_NUMBER, constant=(1,))
_SCATTER = Rule(_NUMBER, attributes={"reduction": ("none",)})

OPERATORS: dict[str, Rule] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Mod"), Rule(_NUMBER, data=(0, 1))),
    **dict.fromkeys(("Abs", "Neg", "Sign"), Rule(_NUMBER)),
    **dict.fromkeys(("Ceil", "Cos", "Erf", "Exp", "Floor", "Gelu", "Log", "Pow"), Rule(_FLOAT)),
    **dict.fromkeys(("Reciprocal", "Sigmoid", "Sin", "Softmax", "Sqrt", "Tanh"), Rule(_FLOAT)),
    **dict.fromkeys(("And", "Or", "Xor"), Rule(_BOOL, data=(0, 1))),
    "Not": Rule(_BOOL),
    **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"), Rule(_NUMBER)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _REDUCTION),
    **dict.fromkeys(("Concat", "Expand", "Identity", "Reshape", "Shape", "Tile"), Rule(_ANY)),
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "Split", "Transpose"), Rule(_ANY)),
    **dict.fromkeys(("ScatterElements", "ScatterND"), _SCATTER),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), Rule(_ANY, constant=(1,))),
    "Cast": Rule(_ANY | {"UINT8"}),
    "CumSum": Rule(_FLOAT, constant=(1,)),
    # Symmetric only. Scales must be positive too, which the quantizer sees to.
    "DequantizeLinear": Rule(
        _QUANTIZED,
        constant=(1, 2),
        note="the last dimension of INT4 is even; a zero point is 0",
    ),
    "If": Rule(_BOOL),  # both branches: outputs of one rank, values of different names
    "Loop": Rule(_NUMBER, note="its number of turns follows from shapes; with a condition"),
    "LayerNormalization": Rule(_FLOAT, outputs=1),
    "MatMul": Rule(_FLOAT, data=(0, 1)),
    "OneHot": Rule(_NUMBER, constant=(1,)),
    "QuantizeLinear": Rule(_FLOAT, constant=(1, 2), note="a zero point is 0"),
    "Range": Rule(_NUMBER),
    "Slice": Rule(_ANY, constant=(3,)),
    "TopK": Rule(
        _NUMBER, constant=(1,), attributes={"sorted": (1,)}, note=f"k is below {MAX_TOPK}"
    ),
    "Where": Rule(_ANY, data=(1, 2)),
}  # fmt: skip


def refusals(model: ir.Model, types: Mapping[str, str]) -> Iterator[str]:
    """One line for each thing TensorRT 10.3 would not take. `types` names the element type of every
    value, as `FLOAT16`; a value it lacks is a finding too."""
    opset = model.opset_imports.get("", 0)
    int4 = any(v.dtype == ir.DataType.INT4 for v in model.graph.initializers.values())
    if opset not in OPSETS and not (int4 and opset == INT4_OPSET):
        yield f"operator set {opset} is not one of TensorRT 10.3"
    if model.ir_version > MAX_IR_VERSION:
        yield f"file format {model.ir_version} is newer than {MAX_IR_VERSION}"
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        rule = OPERATORS.get(node.op_type)
        if rule is None:
            yield f"{node.name}: operator {node.op_type} is not in the table of TensorRT 10.3"
        else:
            yield from _against(node, rule, types)


def _against(node: ir.Node, rule: Rule, types: Mapping[str, str]) -> Iterator[str]:
    for i in rule.data:
        value = node.inputs[i]
        kind = types.get(value.name or "") if value is not None else None
        if kind not in rule.types:
            yield f"{node.name}: input {i} of {node.op_type} is {kind}"
    given = [i for i, value in enumerate(node.inputs) if value is not None]
    for i in set(rule.constant) & set(given):
        if not _is_initializer(node.inputs[i]):
            yield f"{node.name}: input {i} of {node.op_type} is computed"
    if rule.inputs is not None and len(given) > rule.inputs:
        yield f"{node.name}: {node.op_type} has {len(given)} inputs"
    if rule.outputs is not None and len(node.outputs) > rule.outputs:
        yield f"{node.name}: {node.op_type} has {len(node.outputs)} outputs"
    for name, allowed in rule.attributes.items():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value not in allowed:
            yield f"{node.name}: {name} of {node.op_type} is {attribute.value!r}"
    yield from _against_more(node)


def _against_more(node: ir.Node) -> Iterator[str]:
    """The notes of the table."""
    if node.op_type == "TopK" and _largest(node.inputs[1]) >= MAX_TOPK:
        yield f"{node.name}: TopK of {MAX_TOPK} or more"
    if node.op_type == "DequantizeLinear" and _is_odd_int4(node.inputs[0]):
        yield f"{node.name}: an odd last dimension of INT4"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _has_zero_point(node):
        yield f"{node.name}: a zero point that is not 0"
    if node.op_type == "Loop":
        if not _follows_from_shapes(node.inputs[0]):
            yield f"{node.name}: a Loop whose number of turns is data"
        if len(node.inputs) < 2 or node.inputs[1] is None:
            yield f"{node.name}: a Loop without a condition"


def _follows_from_shapes(value: ir.Value | None) -> bool:
    """Whether a value is known before anything runs: made of shapes and initializers."""
    if value is None:
        return False
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return node.op_type == "Shape" or all(_follows_from_shapes(x) for x in node.inputs)


def _largest(value: ir.Value | None) -> int:
    constant = None if value is None else value.const_value
    return 0 if constant is None else int(constant.numpy().max())


def _has_zero_point(node: ir.Node) -> bool:
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    constant = None if zero is None else zero.const_value
    return zero is not None and (constant is None or bool(constant.numpy().any()))


def _is_odd_int4(value: ir.Value | None) -> bool:
    if value is None or value.dtype != ir.DataType.INT4 or value.shape is None:
        return False
    width = value.shape[-1]
    return isinstance(width, int) and width % 2 == 1


def _is_initializer(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()
