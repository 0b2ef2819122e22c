"""Which positions of a step get states and logits: a portable graph gives logits of one a row.

    last_index [b, 1]  ->  state_index [n]: of the b * s tokens, those whose states are normed
                           logits_index [k]: of those n, the ones that get logits
    logits [b, vocab]  ->  logits [k, vocab], and states [n, hidden] float32 beside it

With n = k = b it computes what the portable graph does. A rotation that depends on a row's length
goes on reading last_index. Changes the graph before TensorRT reads it; bundles stay as they are.
What is not as the exporter writes it is an EngineFault naming the node.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import onnx_ir as ir

from remora_contract import targets
from remora_contract.errors import EngineFault

STATE_INDEX = "state_index"
LOGITS_INDEX = "logits_index"
STATES = "states"

_INT64 = ir.DataType.INT64
_NORM = "norm"  # the final norm; in parts, its last node or the one that adds its bias
_NORM_NAMES = (f"{_NORM}.bias", _NORM)

Uses = tuple[tuple[ir.Node, int], ...]  # who reads a value, at which of its inputs


def choose_positions(model: ir.Model, hidden: int) -> None:
    """Changes the model in place. Raises EngineFault."""
    graph = model.graph
    select = _select(graph)
    tokens = _all_tokens(graph, select, hidden)
    _gather(graph, select, tokens, _input(graph, STATE_INDEX, "n"))
    normed = _final_norm(graph)
    readers = tuple((use.node, use.idx) for use in normed.uses())
    _output_states(graph, normed, hidden)
    _keep_some(graph, normed, readers, _input(graph, LOGITS_INDEX, "k"))
    graph.inputs[:] = [v for v in graph.inputs if v.name != targets.LAST_INDEX or v.uses()]
    for value in graph.outputs:
        if value.name == targets.LOGITS:
            assert value.shape is not None  # an output of a portable graph has one
            value.shape = ir.Shape(["k", value.shape[1]])


def _select(graph: ir.Graph) -> ir.Node:
    """The node that keeps one position a row."""
    for node in graph:
        indices = node.inputs[1] if len(node.inputs) > 1 else None
        if indices is None or node.inputs[0] is None:
            continue
        if indices.name == targets.LAST_INDEX and node.inputs[0].name != targets.POSITION_IDS:
            batch = node.attributes.get("batch_dims")
            if node.op_type != "GatherND" or batch is None or batch.as_int() != 1:
                _refuse(node, "expected GatherND with batch_dims 1")
            return node
    raise EngineFault(f"nothing in the graph reads {targets.LAST_INDEX}; export it again")


def _all_tokens(graph: ir.Graph, select: ir.Node, hidden: int) -> ir.Value:
    """[b * s, hidden]"""
    shape = ir.tensor(np.array([-1, hidden], np.int64), name="head.flat_shape")
    flat = ir.Value(name=shape.name, const_value=shape, shape=ir.Shape([2]))
    flat.type = ir.TensorType(_INT64)
    graph.register_initializer(flat)
    return _before(graph, select, "Reshape", "head.tokens", [select.inputs[0], flat])


def _gather(graph: ir.Graph, select: ir.Node, tokens: ir.Value, index: ir.Value) -> None:
    """Takes the place of `select`."""
    chosen = _before(graph, select, "Gather", "head.states", [tokens, index])
    for node, at in tuple(select.outputs[0].uses()):
        node.replace_input_with(at, chosen)
    graph.remove(select, safe=True)


def _final_norm(graph: ir.Graph) -> ir.Value:
    by_name = {node.name: node for node in graph}
    for name in _NORM_NAMES:
        if name in by_name:
            return by_name[name].outputs[0]
    raise EngineFault(f"the graph has no node {_NORM!r}, its final norm; export it again")


def _output_states(graph: ir.Graph, normed: ir.Value, hidden: int) -> None:
    cast = _after(graph, normed, "Cast", STATES, [normed], {"to": int(ir.DataType.FLOAT)})
    cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", hidden])
    graph.outputs.append(cast)


def _keep_some(graph: ir.Graph, normed: ir.Value, readers: Uses, index: ir.Value) -> None:
    """The head reads some of the normed states."""
    kept = _after(graph, normed, "Gather", "head.kept", [normed, index])
    for node, at in readers:
        node.replace_input_with(at, kept)


def _input(graph: ir.Graph, name: str, size: str) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(_INT64), shape=ir.Shape([size]))
    graph.inputs.append(value)
    return value


def _before(
    graph: ir.Graph, place: ir.Node, op: str, name: str, inputs: list[ir.Value | None]
) -> ir.Value:
    node = ir.node(op, inputs, outputs=[ir.Value(name=name)], name=name)
    graph.insert_before(place, [node])
    return node.outputs[0]


def _after(
    graph: ir.Graph,
    value: ir.Value,
    op: str,
    name: str,
    inputs: list[ir.Value],
    attributes: dict[str, int] | None = None,
) -> ir.Value:
    node = ir.node(op, inputs, attributes or {}, outputs=[ir.Value(name=name)], name=name)
    producer = value.producer()
    assert producer is not None  # it is a node's output
    graph.insert_after(producer, [node])
    return node.outputs[0]


def _refuse(node: ir.Node, need: str) -> NoReturn:
    raise EngineFault(
        f"node {node.name!r} ({node.op_type}) is not what this build understands: {need}; export "
        "the bundle with a matching version of remora-build"
    )
