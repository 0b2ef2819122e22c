"""The exporter's own promise: what it writes keeps the rules that a device will hold it to."""

from __future__ import annotations

import onnx_ir as ir

from remora_contract.bundle import GraphDialect
from remora_contract.errors import InternalFault
from remora_contract.graph_lint import findings


def check_graph(model: ir.Model, dialect: GraphDialect = "native") -> None:
    """Raises InternalFault listing what is wrong."""
    if found := findings(model, dialect):
        raise InternalFault("the exported graph breaks its rules: " + "; ".join(found))
