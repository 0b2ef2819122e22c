"""What every layer shares: the graph's inputs and what is computed once from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.layout import RopeName
from remora_build.graph.nodes import Dims, Nodes
from remora_build.graph.ops import Dialect, Rotation
from remora_contract import targets
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec, LayerKind, RopeSpec


@dataclass(frozen=True)
class Inputs:
    """Inputs that every graph has, in their order; `sequence_length` only where a longrope may be
    outgrown."""

    input_ids: ir.Value
    position_ids: ir.Value
    last_index: ir.Value
    sequence_length: ir.Value | None
    pasts: tuple[tuple[ir.Value, ir.Value], ...]


@dataclass(frozen=True)
class Steps:
    """Computed once. `masks` by window, None being the whole past."""

    masks: Mapping[int | None, ir.Value]
    rotations: Mapping[RopeName, Rotation]
    query_scale: ir.Value | None  # [b, 1, s, 1]
    cache_index: ir.Value


def add_inputs(nodes: Nodes, spec: DecoderSpec, graph: GraphSpec) -> Inputs:
    input_ids = nodes.input(targets.INPUT_IDS, "int64", ["b", "s"])
    position_ids = nodes.input(targets.POSITION_IDS, "int64", ["b", "s"])
    last_index = nodes.input(targets.LAST_INDEX, "int64", ["b", 1])
    length = None
    if spec.switches(graph.context) is not None:
        length = nodes.input(targets.SEQUENCE_LENGTH, "int64", ["b", 1])
    cache: Dims = ["b", spec.kv_heads, graph.context, spec.head_dim]
    pasts = tuple(
        (
            nodes.input(targets.past_key(layer), graph.dtype, cache),
            nodes.input(targets.past_value(layer), graph.dtype, cache),
        )
        for layer in range(spec.layers)
    )
    return Inputs(input_ids, position_ids, last_index, length, pasts)


def add_steps(
    nodes: Nodes, ops: Dialect, spec: DecoderSpec, graph: GraphSpec, inputs: Inputs
) -> Steps:
    windows = dict.fromkeys(
        effective_window(spec.kind(layer), graph) for layer in range(spec.layers)
    )
    positions = inputs.position_ids
    return Steps(
        masks={window: ops.mask(positions, window) for window in windows},
        rotations={
            name: _rotation(nodes, graph, inputs, name, found)
            for name, found in layout.ropes(spec).items()
        },
        query_scale=_query_scale(nodes, positions) if spec.query_scale else None,
        cache_index=ops.cache_index(positions),
    )


def effective_window(kind: LayerKind, graph: GraphSpec) -> int | None:
    """A window as wide as the cache hides nothing."""
    return None if kind.window is None or kind.window >= graph.context else kind.window


def _rotation(
    nodes: Nodes, graph: GraphSpec, inputs: Inputs, name: RopeName, found: RopeSpec
) -> Rotation:
    cos, sin = (nodes.weight(table) for table in layout.rope_tables(name))
    positions = inputs.position_ids
    switch = found.switches(graph.context)
    if switch is not None and inputs.sequence_length is not None:
        at = "rope" if name == "main" else f"rope.{name}"
        positions = _lengthened(nodes, positions, inputs.sequence_length, at, switch, graph.context)
    return Rotation(cos, sin, positions, found.dims, found.interleaved)


def _lengthened(
    nodes: Nodes, positions: ir.Value, length: ir.Value, at: str, switch: int, context: int
) -> ir.Value:
    """Positions of a longrope: of rows whose sequence is longer than `switch`, rows of the tables'
    second half."""
    long = nodes.add("GreaterOrEqual", f"{at}.is_long", [length, nodes.integers(switch + 1)])
    sizes = [nodes.integers(context), nodes.integers(0)]
    offset = nodes.add("Where", f"{at}.offset", [long, *sizes])
    return nodes.add("Add", f"{at}.positions", [positions, offset])


def _query_scale(nodes: Nodes, position_ids: ir.Value) -> ir.Value:
    table = nodes.weight(layout.QUERY_SCALE)
    found = nodes.add("Gather", "query.scale_of_position", [table, position_ids], {"axis": 0})
    return nodes.add("Unsqueeze", "query.scale_column", [found, nodes.integers(1, 3)])
