"""The legacy dialect: opset 20, operators that TensorRT 10.3 (JetPack 6.2) takes. Norms, rotary
embedding, cache and attention are spelled out; inputs, outputs and weights are the native graph's.

int4 weights raise the operator set to 21, where ONNX has the type (docs/adr/0008).
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph.nodes import Nodes
from remora_build.graph.ops.common import CommonOps
from remora_build.graph.ops.dialect import Rotation
from remora_build.graph.ops.rotary import PlainRotary
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec

OPSET = 20
INT4_OPSET = 21


class LegacyDialect(CommonOps):
    """A `Dialect`."""

    def __init__(self, nodes: Nodes, spec: DecoderSpec, graph: GraphSpec) -> None:
        super().__init__(nodes, spec, graph)
        self._rotary = PlainRotary(nodes, spec.head_dim)

    def cache_index(self, position_ids: ir.Value) -> ir.Value:
        """[b, kv_heads, s, head_dim]: the cache position of every element to be written."""
        nodes, spec = self._nodes, self._spec
        rows = nodes.add("Unsqueeze", "cache.positions", [position_ids, nodes.integers(1, 3)])
        shape = nodes.integers(1, spec.kv_heads, 1, spec.head_dim)
        return nodes.add("Expand", "cache.index", [rows, shape])

    def write_cache(
        self, name: str, past: ir.Value, new: ir.Value, index: ir.Value, *, output: str
    ) -> ir.Value:
        return self._nodes.add(
            "ScatterElements", name, [past, index, new], {"axis": 2}, output=output
        )

    def rms_norm(self, name: str, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        nodes, last = self._nodes, self._nodes.integers(-1)
        wide = self._to_float(f"{name}.float", x)
        square = nodes.add("Mul", f"{name}.square", [wide, wide])
        mean = nodes.add("ReduceMean", f"{name}.mean", [square, last], {"keepdims": 1})
        shifted = nodes.add("Add", f"{name}.shifted", [mean, nodes.number(epsilon, "float32")])
        root = nodes.add("Sqrt", f"{name}.root", [shifted])
        plain = self._from_float(f"{name}.plain", nodes.add("Div", f"{name}.ratio", [wide, root]))
        return nodes.add("Mul", name, [plain, weight])

    def rotate(self, name: str, x: ir.Value, rotation: Rotation) -> ir.Value:
        return self._rotary(name, x, rotation)

    def attend(
        self,
        name: str,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        mask: ir.Value,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> ir.Value:
        return self._attend_in_parts(name, q, k, v, mask, scale, softcap)
