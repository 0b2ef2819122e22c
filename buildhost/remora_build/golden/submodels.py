"""Cuts the written model at the residual stream: a small model that computes one value from others,
its weights still in the data file. Pure work on protos; runs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from remora_build.graph.layout import CACHE_POSITIONS
from remora_contract.bundle import GRAPH_FILE


class Cutter:
    """Cuts one written model as often as wanted."""

    def __init__(self, bundle: Path) -> None:
        self._model = onnx.load(str(bundle / GRAPH_FILE), load_external_data=False)
        graph = self._model.graph
        self._producers = {name: node for node in graph.node for name in node.output}
        self._initializers = {i.name: i for i in graph.initializer}
        self._types = {v.name: v for v in (*graph.input, *graph.output, *graph.value_info)}

    def cut(self, output: str, stops: Sequence[str]) -> onnx.ModelProto:
        """What computes `output` from the graph's inputs and the values in `stops`.

        `output` and `stops` must have a recorded type (`embed.output`, `layers.{l}.output`, inputs
        and outputs of the whole graph).
        """
        nodes, leaves = self._closure(output, set(stops))
        inputs = [self._types[name] for name in leaves if name not in self._initializers]
        graph = onnx.helper.make_graph(
            nodes, output, inputs, [self._output_type(output)], self._used(leaves)
        )
        return onnx.helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )

    def _closure(self, output: str, stops: set[str]) -> tuple[list[onnx.NodeProto], list[str]]:
        """Nodes in the model's order, and the names they read that none of them makes."""
        wanted, seen, leaves = [output], {output}, []
        chosen: set[str] = set()
        while wanted:
            name = wanted.pop()
            node = None if name in stops else self._producers.get(name)
            if node is None:
                leaves.append(name)
                continue
            chosen.add(node.name)
            fresh = [i for i in _reads(node) if i not in seen]
            seen.update(fresh)
            wanted.extend(fresh)
        return [n for n in self._model.graph.node if n.name in chosen], sorted(leaves)

    def _used(self, leaves: Iterable[str]) -> list[onnx.TensorProto]:
        return [self._initializers[name] for name in leaves if name in self._initializers]

    def _output_type(self, name: str) -> onnx.ValueInfoProto:
        return self._types.get(name) or onnx.helper.make_empty_tensor_value_info(name)


def _reads(node: onnx.NodeProto) -> list[str]:
    """Names of the values a node reads, also from within its subgraphs."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            inside = attribute.g
            made = {name for n in inside.node for name in n.output}
            made.update(value.name for value in inside.input)
            read = [name for n in inside.node for name in _reads(n)]
            names += [name for name in dict.fromkeys(read) if name not in made]
    return names


def shrink_cache(model: onnx.ModelProto, context: int) -> None:
    """Gives a cut model a cache of `context` positions: what lies beyond is masked out anyway, so
    the answers are the same and a long capacity costs nothing here."""
    for value in model.graph.input:
        if value.name.startswith(("past_key.", "past_value.")):
            value.type.tensor_type.shape.dim[2].dim_value = context
    positions = np.arange(context, dtype=np.int64).reshape(1, 1, 1, context)
    for tensor in model.graph.initializer:
        if tensor.name == CACHE_POSITIONS:
            tensor.CopyFrom(numpy_helper.from_array(positions, CACHE_POSITIONS))
