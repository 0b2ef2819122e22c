"""The native dialect: opset 24, one fused operator for each operation, as TensorRT >= 10.15 and
ONNX Runtime have them.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from remora_build.graph.ops.common import CommonOps
from remora_build.graph.ops.dialect import Rotation

OPSET = 24


class NativeDialect(CommonOps):
    """A `Dialect`."""

    def cache_index(self, position_ids: ir.Value) -> ir.Value:
        """[b]: where this step's keys and values go."""
        nodes = self._nodes
        zero, one = nodes.integers(0), nodes.integers(1)
        first = nodes.add("Slice", "cache.first_position", [position_ids, zero, one, one])
        return nodes.add("Squeeze", "cache.write_index", [first, one])

    def write_cache(
        self, name: str, past: ir.Value, new: ir.Value, index: ir.Value, *, output: str
    ) -> ir.Value:
        attributes = {"axis": -2, "mode": "linear"}
        return self._nodes.add("TensorScatter", name, [past, new, index], attributes, output=output)

    def rms_norm(self, name: str, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        return self._fused_norm("RMSNormalization", name, x, weight, None, epsilon)

    def rotate(self, name: str, x: ir.Value, rotation: Rotation) -> ir.Value:
        attributes: dict[str, Any] = {}
        if rotation.interleaved:
            attributes["interleaved"] = 1
        if rotation.dims is not None:
            attributes["rotary_embedding_dim"] = rotation.dims
        inputs = [x, rotation.cos, rotation.sin, rotation.positions]
        return self._nodes.add("RotaryEmbedding", name, inputs, attributes)

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
        if softcap is not None:  # TensorRT's parser refuses the attribute
            return self._attend_in_parts(name, q, k, v, mask, scale, softcap)
        return self._nodes.add("Attention", name, [q, k, v, mask], {"scale": scale})
