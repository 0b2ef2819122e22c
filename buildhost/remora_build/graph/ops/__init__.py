"""Operations that each dialect of the portable graph spells its own way (docs/dialects.md).

The decoder asks a `Dialect` for what it means; how many nodes that takes is the dialect's business.
"""

from __future__ import annotations

from remora_build.graph.nodes import Nodes
from remora_build.graph.ops import legacy, native
from remora_build.graph.ops.dialect import Dialect, Rotation
from remora_contract.bundle import GraphDialect, GraphSpec, QuantSpec
from remora_contract.decoder import DecoderSpec

__all__ = ["Dialect", "Rotation", "dialect_of", "opset_of"]


def dialect_of(nodes: Nodes, spec: DecoderSpec, graph: GraphSpec) -> Dialect:
    """The operations of the graph's dialect, adding to `nodes`."""
    if graph.dialect == "legacy":
        return legacy.LegacyDialect(nodes, spec, graph)
    return native.NativeDialect(nodes, spec, graph)


def opset_of(dialect: GraphDialect, quant: QuantSpec) -> int:
    if dialect == "native":
        return native.OPSET
    return legacy.INT4_OPSET if quant.kind == "int4" else legacy.OPSET
