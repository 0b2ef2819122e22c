"""A mixture of experts: each token's `active` best of `count` MLPs, weighted.

    p = softmax(x R)    y = sum over the chosen e of p_e mlp_e(x)   [+ the shared expert's]

A Loop runs over tiles of tokens that share an expert (`tiles`); its body cuts that expert's
matrices out of the stacks and reads no other. Memory: one expert's matrices at a time.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.expert_weights import ExpertWeights
from remora_build.graph.kit import Kit
from remora_build.graph.linear import GateInputs, columns
from remora_build.graph.mlp import Mlp, activated
from remora_build.graph.nodes import IR_DTYPE, Nodes
from remora_build.graph.tiles import Tiles, Tiling
from remora_contract import targets
from remora_contract.decoder import ExpertsSpec
from remora_contract.targets import PARTS, Group


class Experts:
    """Calls are layers: `experts(layer, x [b, s, hidden]) -> [b, s, hidden]`."""

    def __init__(
        self, kit: Kit, experts: ExpertsSpec, mlp: Mlp, gates: GateInputs, position_ids: ir.Value
    ) -> None:
        self._kit = kit
        self._experts = experts
        self._mlp = mlp
        self._tiling = Tiling(kit.nodes, experts, position_ids)
        self._weights = ExpertWeights(kit)
        self._branch = _AdapterBranch(kit, gates, self._tiling.length)

    def __call__(self, layer: int, x: ir.Value) -> ir.Value:
        kit, nodes, at = self._kit, self._kit.nodes, f"layers.{layer}.experts"
        flat = nodes.add("Reshape", f"{at}.rows", [x, nodes.integers(-1, kit.spec.hidden)])
        weights, chosen = self._routed(layer, flat)
        tiles = self._tiling(layer, chosen)
        body = self._body(layer, flat, tiles)
        made = nodes.add(
            "Loop", f"{at}.loop", [self._tiling.count, nodes.true()], {"body": body}
        )  # [tiles, T, hidden]
        slots = nodes.add("Reshape", f"{at}.made", [made, nodes.integers(-1, kit.spec.hidden)])
        found = nodes.add("Gather", f"{at}.found", [slots, tiles.slot], {"axis": 0})
        shape = nodes.integers(-1, self._experts.active, kit.spec.hidden)
        parts = nodes.add("Reshape", f"{at}.parts", [found, shape])
        mixed = nodes.add("MatMul", f"{at}.mixed", [weights, parts])  # [N, 1, hidden]
        output = nodes.add("Reshape", f"{at}.output", [mixed, self._stream_shape(layer)])
        if self._experts.shared_intermediate is None:
            return output
        return nodes.add("Add", f"{at}.with_shared", [output, self._shared(layer, x)])

    def _routed(self, layer: int, flat: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Weights [N, 1, k] in the graph's dtype and experts [N, k] of each token."""
        nodes, at = self._kit.nodes, f"layers.{layer}.router"
        scores = nodes.add("MatMul", f"{at}.matmul", [flat, nodes.weight(f"{at}.weight")])
        wide = nodes.add("Cast", f"{at}.float", [scores], {"to": ir.DataType.FLOAT})
        shares = nodes.add("Softmax", f"{at}.softmax", [wide], {"axis": -1})
        count = nodes.integers(self._experts.active)
        best, chosen = nodes.add_pair("TopK", f"{at}.topk", [shares, count], {"axis": -1})
        if self._experts.renormalize:
            total = nodes.add("ReduceSum", f"{at}.total", [best, nodes.integers(1)])
            best = nodes.add("Div", f"{at}.renormalized", [best, total])
        row = nodes.add("Unsqueeze", f"{at}.row", [best, nodes.integers(1)])
        to = {"to": IR_DTYPE[self._kit.graph.dtype]}
        return nodes.add("Cast", f"{at}.weights", [row], to), chosen

    def _body(self, layer: int, flat: ir.Value, tiles: Tiles) -> ir.Graph:
        """Tile number -> what its expert makes of its tokens [T, hidden]."""
        kit, at = self._kit, f"layers.{layer}"
        nodes = kit.nodes.body()
        number = nodes.input(f"{at}.experts.tile", "int64", [])
        # Only the number of tiles ends the loop, but TensorRT's parser dies of one without this.
        more = nodes.input(f"{at}.experts.more", "bool", [])
        goes_on = nodes.add("Identity", f"{at}.experts.goes_on", [more])
        expert = nodes.add("Gather", f"{at}.expert", [tiles.expert, number], {"axis": 0})
        tokens = nodes.add("Gather", f"{at}.expert_tokens", [tiles.tokens, number], {"axis": 0})
        x = nodes.add("Gather", f"{at}.expert_rows", [flat, tokens], {"axis": 0})
        both = self._projected(nodes, layer, "expert_gate_up", x, expert, tokens)
        width = kit.spec.out_features("expert_up")
        bounds = [nodes.integers(n) for n in (0, width, 2 * width)]
        gate, up = (
            nodes.add("Slice", f"{at}.{part}.slice", [both, *bounds[i : i + 2], nodes.integers(1)])
            for i, part in enumerate(PARTS["expert_gate_up"])
        )
        active = activated(kit, f"{at}.expert_gate", gate, nodes)
        product = nodes.add("Mul", f"{at}.expert_product", [active, up])
        made = self._projected(nodes, layer, "expert_down", product, expert, tokens)
        nodes.output(goes_on, "bool", [])
        nodes.output(made, kit.graph.dtype, ["tile", kit.spec.hidden])
        return nodes.subgraph(f"{at}.experts.body")

    def _projected(
        self,
        nodes: Nodes,
        layer: int,
        group: Group,
        x: ir.Value,
        expert: ir.Value,
        tokens: ir.Value,
    ) -> ir.Value:
        """x [T, k] through one expert's packed matrix, with what adapters add."""
        weight = self._weights.of(nodes, layer, group, expert)
        y = nodes.add("MatMul", f"layers.{layer}.{group}.matmul", [x, weight])
        return self._branch.added(nodes, layer, group, x, y, expert, tokens)

    def _stream_shape(self, layer: int) -> ir.Value:
        nodes = self._kit.nodes
        parts = [self._tiling.shape, nodes.integers(self._kit.spec.hidden)]
        return nodes.add("Concat", f"layers.{layer}.experts.stream_shape", parts, {"axis": 0})

    def _shared(self, layer: int, x: ir.Value) -> ir.Value:
        """The expert that every token takes, weighted by a gate of its own."""
        nodes, at = self._kit.nodes, f"layers.{layer}.share"
        made = self._mlp(layer, x, "shared_gate_up", "shared_down")
        if not self._experts.shared_gate:
            return made
        weight = nodes.weight(layout.shared_gate_weight(layer))
        score = nodes.add("MatMul", f"{at}.matmul", [x, weight])
        share = nodes.add("Sigmoid", f"{at}.sigmoid", [score])
        return nodes.add("Mul", f"{at}.weighted", [share, made])


class _AdapterBranch:
    """y + ((x A_e) * gate) B_e for the rows of a tile; A [E, k, t], B [E, t, n], gate [b, 1, t]."""

    def __init__(self, kit: Kit, gates: GateInputs, length: ir.Value) -> None:
        self._kit = kit
        self._length = length  # of a row: tokens are numbered row by row
        self._gates = {g: gate for g in targets.EXPERT_GROUPS if (gate := gates.get(g)) is not None}
        nodes = kit.nodes
        self._rows = {
            group: nodes.add("Squeeze", f"lora_gate.{group}.rows", [gate, nodes.integers(1)])
            for group, gate in self._gates.items()
        }  # [b, t]

    def added(
        self,
        nodes: Nodes,
        layer: int,
        group: Group,
        x: ir.Value,
        y: ir.Value,
        expert: ir.Value,
        tokens: ir.Value,
    ) -> ir.Value:
        if group not in self._gates:
            return y
        spec, dtype, t = self._kit.spec, self._kit.graph.dtype, columns(group)
        k, n = layout.group_in(spec, group), layout.group_out(spec, group)
        count = spec.copies(PARTS[group][0])
        a = self._kit.nodes.input(targets.lora_a(layer, group), dtype, [count, k, t])
        b = self._kit.nodes.input(targets.lora_b(layer, group), dtype, [count, t, n])
        at = f"layers.{layer}"
        own_a = nodes.add("Gather", f"{at}.lora_a.{group}.of_expert", [a, expert], {"axis": 0})
        own_b = nodes.add("Gather", f"{at}.lora_b.{group}.of_expert", [b, expert], {"axis": 0})
        row = nodes.add("Div", f"{at}.{group}.row", [tokens, self._length])
        gate = nodes.add(
            "Gather", f"{at}.lora_gate.{group}.of_token", [self._rows[group], row], {"axis": 0}
        )
        down = nodes.add("MatMul", f"{at}.lora_a.{group}", [x, own_a])
        gated = nodes.add("Mul", f"{at}.lora_gate.{group}", [down, gate])
        up = nodes.add("MatMul", f"{at}.lora_b.{group}", [gated, own_b])
        return nodes.add("Add", f"{at}.{group}.adapted", [y, up])
