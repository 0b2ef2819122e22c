"""Which projection a linear layer is, told by what its result flows into: for graphs whose names
say nothing (weights folded to `val_79`, nodes called `node_linear_3`, metadata stripped).

    q, k, v    flow into the attention: operands of the scores' MatMul, of the MatMul after the
               Softmax, or inputs 0, 1, 2 of an attention operator (q | k | v packed as input 0 of
               GroupQueryAttention)
    o          is the one linear layer that the attention's result flows into
    gate, up   flow into one and the same linear layer, down, and nowhere else; gate passes an
               activation function on the way
    head       flows into the graph's outputs alone

Only plain decoder layers with seven projections are read; what does not fit stays unknown. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from remora_build.insert.naming import Module, Parts
from remora_build.insert.patterns import MICROSOFT, Linear
from remora_build.insert.view import GraphView
from remora_contract.errors import Unsupported

_ATTENTION_OPS = (
    ("", "Attention"),
    (MICROSOFT, "GroupQueryAttention"),
    (MICROSOFT, "MultiHeadAttention"),
)
_ACTIVATIONS = (
    "Sigmoid", "Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Tanh", "Erf", "Relu", "Swish", "Silu",
    "HardSwish",
)  # fmt: skip
_PRODUCTS = ("MatMul", "FusedMatMul")
_MEASURING = ("Shape", "Size")
_MOST_STEPS = 50_000_000
_QKV: tuple[Parts, ...] = (("q",), ("k",), ("v",))


@dataclass
class _Reach:
    """Where a value flows to: ends are linear layers and the operands of attention nodes."""

    linears: set[int] = field(default_factory=set)
    attention: set[tuple[int, int]] = field(default_factory=set)  # node, operand
    output: bool = False
    activated: bool = False


class _Flow:
    """Follows values forward, through everything but linear layers, attention and shapes."""

    def __init__(self, view: GraphView, linears: Sequence[Linear]) -> None:
        self._view = view
        self._linears = {li.node for li in linears}
        self._steps = 0

    def from_value(self, value: str) -> _Reach:
        reach, todo, seen = _Reach(), [value], {value}
        while todo:
            name = todo.pop()
            reach.output |= name in self._view.outputs
            for use in self._view.uses(name):
                self._steps += 1
                if self._steps > _MOST_STEPS:
                    raise Unsupported("the graph is too large to be read by its structure")
                for made in self._step(reach, use.node, use.slot):
                    if made not in seen:
                        seen.add(made)
                        todo.append(made)
        return reach

    def _step(self, reach: _Reach, number: int, slot: int) -> Sequence[str]:
        """Notes an end, or gives what the node makes."""
        node = self._view.nodes[number]
        if number in self._linears:
            reach.linears.add(number)
            return ()
        if self.is_attention(number):
            reach.attention.add((number, slot))
            return ()
        if node.op_type in _MEASURING:
            return ()
        reach.activated |= node.op_type in _ACTIVATIONS
        return [*filter(None, node.output)]

    def is_attention(self, number: int) -> bool:
        node = self._view.nodes[number]
        if (node.domain, node.op_type) in _ATTENTION_OPS:
            return True
        dynamic = [i for i in node.input[:2] if not self._view.is_constant(i)]
        return node.op_type in _PRODUCTS and len(dynamic) == 2


def structural_modules(view: GraphView, linears: Sequence[Linear]) -> dict[int, Module]:
    """Linear layers by node number; empty when the graph is no stack of plain decoder layers."""
    flow = _Flow(view, linears)
    reaches = {li.node: flow.from_value(li.y) for li in linears}
    attention = _attention_layers(view, flow)
    found = _into_attention(reaches, attention)
    found |= _out_of_attention(view, flow, attention)
    found |= _mlp(reaches)
    modules = {
        node: Module(f"layers.{layer}.{'_'.join(parts)}", layer, parts)
        for node, (layer, parts) in found.items()
    }
    for node, reach in reaches.items():
        if reach.output and not reach.linears and not reach.attention:
            modules[node] = Module("lm_head")
    return modules


_Found = dict[int, tuple[int, Parts]]


@dataclass(frozen=True)
class _Attention:
    """One layer's attention: what each operand (node, input) is, and what it results in."""

    operands: dict[tuple[int, int], Parts]
    result: str


def _attention_layers(view: GraphView, flow: _Flow) -> list[_Attention]:
    """In the graph's order. Decomposed: scores = MatMul(q, k), then MatMul(softmax, v)."""
    layers, taken = [], set()
    for number, node in enumerate(view.nodes):
        if number in taken or not flow.is_attention(number):
            continue
        if node.op_type not in _PRODUCTS:
            layers.append(_Attention(_operands(number, node), node.output[0]))
            continue
        mixes = [n for n, slot in flow.from_value(node.output[0]).attention if slot == 0]
        if len(mixes) == 1 and view.nodes[mixes[0]].op_type in _PRODUCTS:
            taken.add(mixes[0])
            places = ((number, 0), (number, 1), (mixes[0], 1))
            operands = dict(zip(places, _QKV, strict=True))
            layers.append(_Attention(operands, view.nodes[mixes[0]].output[0]))
    return layers


def _operands(number: int, node: Any) -> dict[tuple[int, int], Parts]:
    """An attention operator's: q, k, v, or all in one where the operator defines their order."""
    if all(node.input[1:3]):
        return {(number, slot): parts for slot, parts in enumerate(_QKV)}
    return {(number, 0): ("q", "k", "v")} if node.op_type == "GroupQueryAttention" else {}


def _into_attention(reaches: dict[int, _Reach], attention: Sequence[_Attention]) -> _Found:
    found: _Found = {}
    by_operand = {
        operand: (layer, parts)
        for layer, one in enumerate(attention)
        for operand, parts in one.operands.items()
    }
    for node, reach in reaches.items():
        ends = {by_operand.get(operand) for operand in reach.attention}
        if len(ends) == 1 and not reach.linears and (end := ends.pop()) is not None:
            found[node] = end
    return found


def _out_of_attention(view: GraphView, flow: _Flow, attention: Sequence[_Attention]) -> _Found:
    found: _Found = {}
    for layer, one in enumerate(attention):
        reach = flow.from_value(one.result)
        if len(reach.linears) == 1 and not reach.attention:
            found[reach.linears.pop()] = (layer, ("o",))
    return found


def _mlp(reaches: dict[int, _Reach]) -> _Found:
    """Pairs that flow into one linear layer only, in the order of that layer."""
    into: dict[int, list[int]] = {}
    for node, reach in reaches.items():
        if len(reach.linears) == 1 and not reach.attention and not reach.output:
            into.setdefault(next(iter(reach.linears)), []).append(node)
    found: _Found = {}
    for layer, down in enumerate(sorted(into)):
        gates = [n for n in into[down] if reaches[n].activated]
        ups = [n for n in into[down] if not reaches[n].activated]
        if len(gates) == 1 and len(ups) == 1:
            found[gates[0]] = (layer, ("gate",))
            found[ups[0]] = (layer, ("up",))
            found[down] = (layer, ("down",))
    return found
