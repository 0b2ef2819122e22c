"""What every layer shares: the graph's inputs and what is computed once from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from remora_build.graph import layout, rope
from remora_build.graph.layout import RopeName
from remora_build.graph.nodes import Dims, Nodes
from remora_build.graph.ops import Dialect, Rotation
from remora_contract import targets
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec, LayerKind, RopeSpec


@dataclass(frozen=True)
class Inputs:
    """Inputs that every graph has, in their order."""

    input_ids: ir.Value
    position_ids: ir.Value
    last_index: ir.Value
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
    cache: Dims = ["b", spec.kv_heads, graph.context, spec.head_dim]
    pasts = tuple(
        (
            nodes.input(targets.past_key(layer), graph.dtype, cache),
            nodes.input(targets.past_value(layer), graph.dtype, cache),
        )
        for layer in range(spec.layers)
    )
    return Inputs(input_ids, position_ids, last_index, pasts)


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
    if rope.outgrows(found, graph.context):
        positions = _lengthened(nodes, graph, inputs, name, found)
    return Rotation(cos, sin, positions, found.dims, found.interleaved)


def _lengthened(
    nodes: Nodes, graph: GraphSpec, inputs: Inputs, name: RopeName, found: RopeSpec
) -> ir.Value:
    """Positions of a longrope: of rows whose last token lies past the original context, rows of the
    tables' second half."""
    at = "rope" if name == "main" else f"rope.{name}"
    original = nodes.integers(found.original_context or 0)
    chosen = [inputs.position_ids, inputs.last_index]
    last = nodes.add("GatherND", f"{at}.last_position", chosen, {"batch_dims": 1})
    long = nodes.add("GreaterOrEqual", f"{at}.is_long", [last, original])
    sizes = [nodes.integers(graph.context), nodes.integers(0)]
    offset = nodes.add("Where", f"{at}.offset", [long, *sizes])
    column = nodes.add("Unsqueeze", f"{at}.offset_column", [offset, nodes.integers(1)])
    return nodes.add("Add", f"{at}.positions", [inputs.position_ids, column])


def _query_scale(nodes: Nodes, position_ids: ir.Value) -> ir.Value:
    table = nodes.weight(layout.QUERY_SCALE)
    found = nodes.add("Gather", "query.scale_of_position", [table, position_ids], {"axis": 0})
    return nodes.add("Unsqueeze", "query.scale_column", [found, nodes.integers(1, 3)])
