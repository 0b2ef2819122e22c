"""Reading and changing a graph strictly: what is not as expected is an EngineFault naming the node.

Owns the vocabulary the other files of this package share; knows no operator's meaning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from remora_contract.errors import EngineFault

MICROSOFT = "com.microsoft"


def refuse(node: ir.Node, need: str) -> NoReturn:
    raise EngineFault(
        f"node {node.name!r} ({node.op_type}) is not what this engine build understands: {need}; "
        "export the bundle with a matching version of remora-build"
    )


def producer(value: ir.Value | None, op_type: str, of: ir.Node) -> ir.Node:
    """The node that makes `value`, an input of `of`. Raises EngineFault when it is no `op_type`."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or node.domain not in ("", "ai.onnx"):
        found = "nothing" if node is None else f"{node.op_type} {node.name!r}"
        refuse(of, f"expected {op_type} before it, found {found}")
    return node


def only_user(value: ir.Value, op_type: str, of: ir.Node) -> ir.Node:
    """The one node that reads `value`, an output of `of`. Raises EngineFault."""
    users = [use.node for use in value.uses()]
    if len(users) != 1 or users[0].op_type != op_type or value.is_graph_output():
        found = ", ".join(f"{u.op_type} {u.name!r}" for u in users) or "nothing"
        refuse(of, f"expected exactly {op_type} after it, found {found}")
    return users[0]


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Raises EngineFault when the input is absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        refuse(node, f"input {index} is missing")
    return value


def no_more_inputs(node: ir.Node, count: int) -> None:
    """An optional input this build would not honour must not be there. Raises EngineFault."""
    if any(value is not None for value in node.inputs[count:]):
        refuse(node, f"expected {count} inputs")


def constant(node: ir.Node, index: int) -> NDArray[Any]:
    """The initializer at an input, as numpy. Raises EngineFault when it is computed."""
    return tensor(node, index).numpy()


def tensor(node: ir.Node, index: int) -> ir.TensorProtocol:
    """The initializer at an input, not yet read from disk. Raises EngineFault."""
    value = input_of(node, index)
    if not value.is_initializer() or value.const_value is None:
        refuse(node, f"input {index} ({value.name!r}) must be an initializer")
    return value.const_value


def integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else int(attribute.as_int())


def number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.as_float())


def other_input(node: ir.Node, value: ir.Value) -> ir.Value:
    """Of a two-input node, the input that is not `value`. Raises EngineFault."""
    a, b = input_of(node, 0), input_of(node, 1)
    if (a is value) == (b is value):
        refuse(node, "expected two different inputs")
    return b if a is value else a


class Editor:
    """One graph under change. New nodes go to its end: it is sorted when all rewrites are done."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph

    def emit(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        outputs: Sequence[str] | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> tuple[ir.Value, ...]:
        """Adds a node; its outputs bear the given names, "" for one that nobody reads."""
        values = [ir.Value(name=n) for n in (outputs if outputs is not None else [name])]
        node = ir.node(
            op_type, inputs, dict(attributes or {}), domain=domain, outputs=values, name=name
        )
        self.graph.append(node)
        return tuple(values)

    def initializer(self, array: NDArray[Any], name: str) -> ir.Value:
        """A small constant; the same name twice gives the same value."""
        known = self.graph.initializers.get(name)
        return known if known is not None else self.lazy(ir.tensor(array, name=name))

    def lazy(self, made: ir.TensorProtocol) -> ir.Value:
        """An initializer whose bytes may be made only when the model is written."""
        value = ir.Value(
            name=made.name, const_value=made, shape=_shape(made), type=ir.TensorType(made.dtype)
        )
        self.graph.register_initializer(value)
        return value

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Adds a graph input, or returns the one of this name."""
        for value in self.graph.inputs:
            if value.name == name:
                return value
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Everybody who read `old` reads `new`; a graph output keeps its name."""
        for user, index in tuple(old.uses()):
            user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                name, old.name = old.name, f"{old.name}.before"
                new.name, new.type, new.shape = name, old.type, old.shape
                self.graph.outputs[index] = new

    def nodes(self, op_type: str) -> list[ir.Node]:
        """All nodes of a type, as they are now: safe to change the graph while going through."""
        return [n for n in self.graph if n.op_type == op_type and n.domain in ("", "ai.onnx")]


def widened(source: ir.TensorProtocol, name: str) -> ir.LazyTensor:
    """The same values in float32, made when the model is written."""
    return ir.LazyTensor(
        lambda: ir.tensor(np.asarray(source.numpy()).astype(np.float32), name=name),
        dtype=ir.DataType.FLOAT,
        shape=_shape(source),
        name=name,
    )


def _shape(of: ir.TensorProtocol) -> ir.Shape:
    return ir.Shape(int(d) for d in of.shape.numpy())
