"""A dense MLP: down(act(gate x) * up x), from packed projections."""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph.kit import Kit
from remora_contract.targets import PARTS, Group


class Mlp:
    """Calls are layers: `mlp(layer, x [b, s, hidden]) -> [b, s, hidden]`."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def __call__(
        self, layer: int, x: ir.Value, into: Group = "gate_up", out: Group = "down"
    ) -> ir.Value:
        kit, at = self._kit, f"layers.{layer}"
        gate, up = kit.parts(kit.linear(layer, into, x), layer, PARTS[into])
        stem = "mlp" if out == "down" else "shared_mlp"
        product = kit.nodes.add(
            "Mul", f"{at}.{stem}.product", [activated(kit, f"{at}.{PARTS[into][0]}", gate), up]
        )
        return kit.linear(layer, out, product)


def activated(kit: Kit, at: str, x: ir.Value) -> ir.Value:
    """The decoder's activation, of any shape."""
    if kit.spec.activation != "silu":
        return kit.ops.gelu(f"{at}.gelu", x, tanh=kit.spec.activation == "gelu_tanh")
    sigmoid = kit.nodes.add("Sigmoid", f"{at}.sigmoid", [x])
    return kit.nodes.add("Mul", f"{at}.silu", [x, sigmoid])
