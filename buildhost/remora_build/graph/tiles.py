"""Which tokens go to which expert, in tiles of one expert each.

With N tokens, k experts for each of them and E in all, A = N k pairs (token, expert) are sorted by
expert into tiles of T = ceil(A / E) slots; a tile holds tokens of one expert only, so there are at
most min(A, E + A / T) tiles, at most 2 E in a prefill and k for one token. Slots that stay empty
hold token 0, whose result there nobody reads.

All of it is whole numbers, [A, E] of them at most, in int64 and, where sums run (TensorRT 10.3 has
them for floats only), in float32, which holds them exactly. Knows no weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from remora_build.graph.nodes import Nodes
from remora_contract.decoder import ExpertsSpec


@dataclass(frozen=True)
class Tiles:
    """One layer's."""

    tokens: ir.Value  # [tiles, T], rows of the tokens [N, ...]
    expert: ir.Value  # [tiles]
    slot: ir.Value  # [A], where each pair is: tile * T + place in it


class Tiling:
    """What all layers share, from the shape of the step; calls are layers."""

    def __init__(self, nodes: Nodes, experts: ExpertsSpec, position_ids: ir.Value) -> None:
        self._nodes = nodes
        self._experts = experts
        self.shape = nodes.add("Shape", "experts.shape", [position_ids])  # [b, s]
        rows, length = (
            nodes.add("Gather", f"experts.{name}", [self.shape, nodes.integers(axis)])
            for axis, name in enumerate(("rows", "length"))
        )
        self.length = length  # [1], of a row
        tokens = nodes.add("Mul", "experts.tokens", [rows, length])
        self._pairs = self._int("Mul", "experts.pairs", tokens, experts.active)
        rounded = self._int("Add", "experts.pairs_rounded", self._pairs, experts.count - 1)
        self._size = self._int("Div", "experts.tile_size", rounded, experts.count)
        full = nodes.add("Div", "experts.full_tiles", [self._pairs, self._size])
        most = self._int("Add", "experts.most_tiles", full, experts.count)
        self._count = nodes.add("Min", "experts.tiles", [self._pairs, most])
        self.count = nodes.add("Squeeze", "experts.tile_count", [self._count])  # scalar
        self._tile_shape = nodes.add(
            "Concat", "experts.tile_shape", [self._count, self._size], {"axis": 0}
        )
        slots = nodes.add("Mul", "experts.slots", [self._count, self._size])
        zero = nodes.number(0, "int64")
        self._empty = nodes.add("Expand", "experts.empty_slots", [zero, slots])
        self._tile_numbers = self._range("experts.tile_numbers", self.count)
        self._numbers = self._range("experts.numbers", nodes.number(experts.count, "int64"))
        pairs = nodes.add("Squeeze", "experts.pair_count", [self._pairs])
        numbers = self._range("experts.pair_numbers", pairs)
        self._token_of = self._int("Div", "experts.token_of_pair", numbers, experts.active)

    def __call__(self, layer: int, chosen: ir.Value) -> Tiles:
        """`chosen` [N, k]: the experts of each token."""
        nodes, at = self._nodes, f"layers.{layer}.experts"
        pairs = nodes.add("Reshape", f"{at}.chosen", [chosen, nodes.integers(-1)])
        column = nodes.add("Unsqueeze", f"{at}.chosen_column", [pairs, nodes.integers(1)])
        same = nodes.add("Equal", f"{at}.is_chosen", [column, self._numbers])
        hits = nodes.add("Cast", f"{at}.hits", [same], {"to": ir.DataType.FLOAT})  # [A, E]
        ends, first = self._bounds(at, hits)
        start = nodes.add("Gather", f"{at}.start", [first, pairs], {"axis": 0})
        begin = nodes.add("Mul", f"{at}.begin", [start, self._size])
        slot = nodes.add("Add", f"{at}.slot", [begin, self._place(at, hits)])
        scattered = nodes.add(
            "ScatterElements", f"{at}.slot_tokens", [self._empty, slot, self._token_of]
        )
        tokens = nodes.add("Reshape", f"{at}.tile_tokens", [scattered, self._tile_shape])
        return Tiles(tokens, self._owner(at, ends), slot)

    def _place(self, at: str, hits: ir.Value) -> ir.Value:
        """[A]: how many pairs before it have the same expert."""
        nodes = self._nodes
        running = nodes.add("CumSum", f"{at}.running", [hits, nodes.number(0, "int64")])
        own = nodes.add("Mul", f"{at}.own", [hits, running])
        upto = nodes.add("ReduceSum", f"{at}.upto", [own, nodes.integers(1)], {"keepdims": 0})
        counted = nodes.add("Cast", f"{at}.upto_whole", [upto], {"to": ir.DataType.INT64})
        return self._int("Sub", f"{at}.place", counted, 1)

    def _bounds(self, at: str, hits: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The tile behind each expert's last one, and its first, both [E]."""
        nodes = self._nodes
        loads = nodes.add("ReduceSum", f"{at}.loads", [hits, nodes.integers(0)], {"keepdims": 0})
        whole = nodes.add("Cast", f"{at}.loads_whole", [loads], {"to": ir.DataType.INT64})
        padded = nodes.add("Add", f"{at}.loads_padded", [whole, self._size])
        rounded = self._int("Sub", f"{at}.loads_rounded", padded, 1)
        counts = nodes.add("Div", f"{at}.tile_counts", [rounded, self._size])
        summands = nodes.add("Cast", f"{at}.tile_counts_float", [counts], {"to": ir.DataType.FLOAT})
        sums = nodes.add("CumSum", f"{at}.ends_float", [summands, nodes.number(0, "int64")])
        ends = nodes.add("Cast", f"{at}.ends", [sums], {"to": ir.DataType.INT64})
        return ends, nodes.add("Sub", f"{at}.starts", [ends, counts])

    def _owner(self, at: str, ends: ir.Value) -> ir.Value:
        """[tiles]: how many experts' tiles end before; of the spare tiles at the end the last."""
        nodes = self._nodes
        row = nodes.add("Unsqueeze", f"{at}.ends_row", [ends, nodes.integers(0)])
        column = nodes.add(
            "Unsqueeze", f"{at}.tile_column", [self._tile_numbers, nodes.integers(1)]
        )
        past = nodes.add("LessOrEqual", f"{at}.is_past", [row, column])
        counted = nodes.add("Cast", f"{at}.past", [past], {"to": ir.DataType.INT64})
        owner = nodes.add(
            "ReduceSum", f"{at}.owner_or_spare", [counted, nodes.integers(1)], {"keepdims": 0}
        )
        return self._int("Min", f"{at}.owner", owner, self._experts.count - 1)

    def _int(self, op: str, name: str, x: ir.Value, number: int) -> ir.Value:
        return self._nodes.add(op, name, [x, self._nodes.integers(number)])

    def _range(self, name: str, end: ir.Value) -> ir.Value:
        zero, one = (self._nodes.number(x, "int64") for x in (0, 1))
        return self._nodes.add("Range", name, [zero, end, one])
