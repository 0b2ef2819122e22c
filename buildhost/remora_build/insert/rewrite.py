"""Adds the branches to an onnx.ModelProto: y becomes y + ((x A) * gate) B; A, gate, B are inputs.

The value that was y keeps its name and is now made by the last Add, so that whoever read it, graph
outputs and subgraphs included, reads the adapted one. Nothing else of the model changes.
Owns nodes and inputs; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remora_build.insert.branches import Branch, Gate
from remora_contract.errors import Refused

_INT64 = 7


def insert_branches(proto: Any, gates: Sequence[Gate], branches: Sequence[Branch]) -> None:
    """Changes `proto` in place. Raises Refused when one of the new names is taken."""
    pieces = [_Pieces(branch) for branch in branches]
    _check_names(proto, gates, pieces)
    for gate in gates:
        _add_input(proto.graph, gate.name, gate.onnx_dtype, [ROWS, 1, gate.columns])
    for branch in branches:
        t = branch.gate.columns
        _add_input(proto.graph, branch.a, branch.gate.onnx_dtype, [branch.k, t])
        _add_input(proto.graph, branch.b, branch.gate.onnx_dtype, [t, branch.n])
    by_maker = {piece.branch.maker: piece for piece in pieces}
    old = list(proto.graph.node)
    del proto.graph.node[:]
    for number, node in enumerate(old):
        proto.graph.node.append(node)
        if piece := by_maker.get(number):
            made = proto.graph.node[-1]
            names = [piece.base if v == piece.branch.output else v for v in made.output]
            made.output[:] = names
            proto.graph.node.extend(piece.nodes())


ROWS = "lora_rows"  # the first axis of a gate: as many as the activations have, or 1


def _add_input(graph: Any, name: str, dtype: int, dims: Sequence[int | str]) -> None:
    tensor = graph.input.add(name=name).type.tensor_type
    tensor.elem_type = dtype
    for dim in dims:
        if isinstance(dim, str):
            tensor.shape.dim.add(dim_param=dim)
        else:
            tensor.shape.dim.add(dim_value=dim)


def _check_names(proto: Any, gates: Sequence[Gate], pieces: Sequence[_Pieces]) -> None:
    graph = proto.graph
    taken = {n.name for n in graph.node} | {v for n in graph.node for v in (*n.output, *n.input)}
    taken |= {v.name for v in (*graph.input, *graph.output, *graph.value_info)}
    taken |= {t.name for t in graph.initializer}
    new = [g.name for g in gates]
    for piece in pieces:
        new += [piece.branch.a, piece.branch.b, piece.base, *(n.name for n in piece.nodes())]
    for name in new:
        if name in taken:
            raise Refused(
                f"the model has something called {name!r} already: does it carry adapter inputs?"
            )


@dataclass(frozen=True)
class _Pieces:
    """The nodes of one branch. Each makes one value, which is called as the node is; the last one
    makes y."""

    branch: Branch

    @property
    def base(self) -> str:
        """What y was without the branch."""
        return f"{self.branch.at}.base"

    def nodes(self) -> list[Any]:
        branch, made = self.branch, _Made()
        x = self._activation(made)
        at = f"layers.{branch.layer}"
        down = made.add("MatMul", f"{at}.lora_a.{branch.slot}", [x, branch.a])
        gated = made.add("Mul", f"{at}.lora_gate.{branch.slot}", [down, branch.gate.name])
        up = made.add("MatMul", f"{at}.lora_b.{branch.slot}", [gated, branch.b])
        if branch.flat:
            up = made.reshaped(up, [-1, branch.n], f"{branch.at}.flat")
        if branch.result_dtype != branch.gate.onnx_dtype:
            up = made.add("Cast", f"{branch.at}.cast", [up])
            made.attribute("to", branch.result_dtype)
        made.add("Add", f"{branch.at}.adapted", [self.base, up])
        made.last.output[:] = [branch.output]
        return made.nodes

    def _activation(self, made: _Made) -> str:
        """x [rows, s, k] with the axis of rows first."""
        branch, name = self.branch, f"{self.branch.at}.activation"
        if branch.reshape is None:
            return branch.input
        if branch.reshape == "like":
            shape = made.add("Shape", f"{name}.shape", [branch.read_by_node])
            return made.add("Reshape", name, [branch.input, shape])
        leading = [0, -1] if branch.reshape == "rows" else [-1, 1]
        return made.reshaped(branch.input, [*leading, branch.k], name)


class _Made:
    """Nodes of the default domain in the order in which they are asked for."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []

    @property
    def last(self) -> Any:
        return self.nodes[-1]

    def add(self, op: str, name: str, inputs: Sequence[str]) -> str:
        import onnx

        self.nodes.append(onnx.NodeProto(op_type=op, name=name, input=inputs, output=[name]))
        return name

    def attribute(self, name: str, value: Any) -> None:
        import onnx

        self.last.attribute.append(onnx.helper.make_attribute(name, value))

    def reshaped(self, value: str, dims: Sequence[int], name: str) -> str:
        import onnx

        shape = self.add("Constant", f"{name}.shape", [])
        self.attribute("value", onnx.helper.make_tensor("", _INT64, [len(dims)], dims))
        return self.add("Reshape", name, [value, shape])
