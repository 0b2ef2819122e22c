"""Operations that each dialect of the portable graph spells its own way (docs/dialects.md).

The decoder asks a `Dialect` for what it means; how many nodes that takes is the dialect's business.
"""

from __future__ import annotations

from remora_build.graph.nodes import Nodes
from remora_build.graph.ops.dialect import Dialect, Rotation
from remora_build.graph.ops.native import NativeDialect
from remora_contract.bundle import DecoderSpec, GraphSpec

__all__ = ["Dialect", "Rotation", "dialect_of"]


def dialect_of(nodes: Nodes, spec: DecoderSpec, graph: GraphSpec) -> Dialect:
    """The operations of the graph's dialect, adding to `nodes`."""
    return NativeDialect(nodes, spec, graph)
