"""A graph to walk in: who makes a value, who reads it, what is constant, which type it has.

Pure: reads an onnx.GraphProto and the types that were inferred for it. Knows operators only by what
they do to a shape; knows no projection.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from remora_contract.errors import InvalidInput

Dim = int | str | None  # a text is a symbolic dimension
Shape = tuple[Dim, ...]

# They hand on their first input's elements in order.
SAME_ELEMENTS = frozenset({"Cast", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_SAME_SHAPE = frozenset({"Cast", "Identity", "Mul", "Add", "Sub", "Div", "Clip", "Round"})


@dataclass(frozen=True)
class TensorType:
    """`dtype` is a number of TensorProto.DataType; `shape` None: not even the rank is known."""

    dtype: int
    shape: Shape | None


@dataclass(frozen=True)
class Use:
    """Node number `node` reads the value as its input number `slot`."""

    node: int
    slot: int


class GraphView:
    """Nodes are spoken of by their number in the graph's order, values by their name."""

    def __init__(
        self, graph: Any, types: Mapping[str, TensorType], *, has_functions: bool = False
    ) -> None:
        """Raises InvalidInput for a graph that is not in topological order or names a value
        twice."""
        self.nodes: list[Any] = list(graph.node)
        self.has_functions = has_functions
        self.inputs = {v.name for v in graph.input}
        self.outputs = {v.name for v in graph.output}
        self.initializers = {t.name: t for t in graph.initializer}
        self._types = types
        self._producers: dict[str, int] = {}
        self._uses: dict[str, list[Use]] = {}
        self._inner_reads: set[str] = set()
        self._constant: dict[str, bool] = dict.fromkeys(self.initializers, True)
        for number, node in enumerate(self.nodes):
            self._add(number, node)

    def _add(self, number: int, node: Any) -> None:
        for slot, name in enumerate(node.input):
            if name and name not in self._producers and not self.is_source(name):
                raise InvalidInput(f"node {node.name!r} reads {name!r}, which nothing before makes")
            self._uses.setdefault(name, []).append(Use(number, slot))
        inner = set(_inner_reads(node))
        self._inner_reads |= inner
        reads = [*filter(None, node.input), *inner]
        constant = all(self._constant.get(name, False) for name in reads)
        for name in filter(None, node.output):
            if name in self._producers or self.is_source(name):
                raise InvalidInput(f"value {name!r} is made twice")
            self._producers[name] = number
            self._constant[name] = constant and not node.op_type.startswith("Random")

    def is_source(self, value: str) -> bool:
        """Whether it is given from outside or stored."""
        return value in self.inputs or value in self.initializers

    def maker(self, value: str) -> int | None:
        """Number of the node whose output it is."""
        return self._producers.get(value)

    def producer(self, value: str) -> Any | None:
        number = self._producers.get(value)
        return None if number is None else self.nodes[number]

    def uses(self, value: str) -> tuple[Use, ...]:
        """By nodes of the graph itself, not of subgraphs."""
        return tuple(self._uses.get(value, ()))

    def only_reader(self, value: str) -> int | None:
        """The one node that reads it; None when anything else does, subgraphs and the graph's
        outputs included."""
        uses = self._uses.get(value, ())
        if len(uses) != 1 or value in self.outputs or value in self._inner_reads:
            return None
        return uses[0].node

    def is_constant(self, value: str) -> bool:
        """Whether it is computed from stored tensors alone."""
        return self._constant.get(value, False)

    def constant_leaves(self, value: str) -> tuple[str, ...]:
        """The initializers that a constant value is computed from, largest first."""
        found: dict[str, int] = {}
        todo, seen = [value], {value}
        while todo:
            name = todo.pop()
            if name in self.initializers:
                found[name] = prod(self.initializers[name].dims)
            node = self.producer(name)
            for read in () if node is None else node.input:
                if read and read not in seen:
                    seen.add(read)
                    todo.append(read)
        return tuple(sorted(found, key=lambda n: (-found[n], n)))

    def dtype(self, value: str) -> int | None:
        """As stored, declared or inferred."""
        if value in self.initializers:
            return int(self.initializers[value].data_type)
        known = self._types.get(value)
        return known.dtype if known and known.dtype else None

    def shape(self, value: str) -> Shape | None:
        """As stored, declared or inferred; else read off the constants that it is made of."""
        if value in self.initializers:
            return tuple(self.initializers[value].dims)
        known = self._types.get(value)
        if known is not None and known.shape is not None:
            return known.shape
        return self._made_shape(value) if self.is_constant(value) else None

    def rank(self, value: str) -> int | None:
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def _made_shape(self, value: str) -> Shape | None:
        """Through operators that an inference of standard types may not know (block-wise and
        vendors' DequantizeLinear), along the first input: a scale never widens it."""
        transposed = False
        for _ in range(len(self.nodes)):
            node = self.producer(value)
            if node is None or not node.input:
                tensor = None if node is None else attribute(node, "value")
                shape = None if tensor is None else tuple(tensor.dims)
                break
            if node.op_type == "Transpose" and attribute(node, "perm") in (None, [1, 0]):
                transposed = not transposed
            elif node.op_type not in _SAME_SHAPE and not is_dequantize(node):
                return None
            value = node.input[0]
            if value in self.initializers or value in self._types:
                shape = self.shape(value)
                break
        else:
            return None
        if shape is None or not transposed:
            return shape
        return shape[::-1] if len(shape) == 2 else None


def attribute(node: Any, name: str) -> Any | None:
    """Value of an int, float, text, ints or tensor attribute; None when it is not set."""
    for a in node.attribute:
        if a.name == name:
            kinds = {1: a.f, 2: a.i, 3: a.s.decode(errors="replace"), 4: a.t, 7: list(a.ints)}
            return kinds.get(a.type)
    return None


def is_dequantize(node: Any) -> bool:
    """The standard operator and the vendors' (TRT_MXFP8DequantizeLinear, ...)."""
    return bool(node.op_type.endswith("DequantizeLinear"))


def is_quantize(node: Any) -> bool:
    """QuantizeLinear, DynamicQuantizeLinear, TRT_FP8QuantizeLinear, TRT_FP4DynamicQuantize, ..."""
    name = node.op_type
    return bool(name.endswith(("QuantizeLinear", "DynamicQuantize")) or name == _DYNAMIC)


_DYNAMIC = "DynamicQuantizeLinear"


def is_fake_quantize(node: Any) -> bool:
    """Quantizes and dequantizes in one node (TRT_FP4QDQ)."""
    return bool(node.op_type.endswith("QDQ"))


def _inner_reads(node: Any) -> Iterable[str]:
    """What the subgraphs of an If, Loop or Scan read, from outside or from themselves."""
    for a in node.attribute:
        for graph in ([a.g] if a.HasField("g") else []) + list(a.graphs):
            yield from (v.name for v in graph.output)
            for inner in graph.node:
                yield from filter(None, inner.input)
                yield from _inner_reads(inner)
