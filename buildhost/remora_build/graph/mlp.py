"""A dense MLP: down(act(gate x) * up x), from packed projections."""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph.kit import Kit
from remora_build.graph.nodes import Nodes
from remora_build.graph.ops import dialect_of
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


def activated(kit: Kit, at: str, x: ir.Value, body: Nodes | None = None) -> ir.Value:
    """The decoder's activation, of any shape; in a subgraph's `body` if one is given."""
    nodes = body or kit.nodes
    if kit.spec.activation != "silu":
        ops = kit.ops if body is None else dialect_of(body, kit.spec, kit.graph)
        return ops.gelu(f"{at}.gelu", x, tanh=kit.spec.activation == "gelu_tanh")
    sigmoid = nodes.add("Sigmoid", f"{at}.sigmoid", [x])
    return nodes.add("Mul", f"{at}.silu", [x, sigmoid])
