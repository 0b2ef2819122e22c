"""Rotary embedding of plain operators.

(a, b) -> (a cos - b sin, a sin + b cos)        of each pair, at the row's positions
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph.nodes import Nodes
from remora_build.graph.ops.dialect import Rotation

_Pair = tuple[ir.Value, ir.Value]


class PlainRotary:
    """Turns heads [b, heads, s, head_dim]; cosines and sines are looked up once for all layers."""

    def __init__(self, nodes: Nodes, head_dim: int) -> None:
        self._nodes = nodes
        self._head_dim = head_dim
        self._angles: dict[tuple[ir.Value, ir.Value], _Pair] = {}

    def __call__(self, name: str, x: ir.Value, rotation: Rotation) -> ir.Value:
        dims = rotation.dims or self._head_dim
        if dims == self._head_dim:
            return self._turned(name, name, x, rotation, dims)
        turning = self._slice(f"{name}.turning", x, 0, dims)
        rest = self._slice(f"{name}.rest", x, dims, self._head_dim)
        turned = self._turned(name, f"{name}.turned", turning, rotation, dims)
        return self._nodes.add("Concat", name, [turned, rest], {"axis": -1})

    def _turned(self, at: str, name: str, x: ir.Value, rotation: Rotation, dims: int) -> ir.Value:
        nodes, (cos, sin) = self._nodes, self._looked_up(rotation)
        a, b = self._pair(at, x, dims, interleaved=rotation.interleaved)
        a_cos = nodes.add("Mul", f"{at}.a_cos", [a, cos])
        b_sin = nodes.add("Mul", f"{at}.b_sin", [b, sin])
        a_sin = nodes.add("Mul", f"{at}.a_sin", [a, sin])
        b_cos = nodes.add("Mul", f"{at}.b_cos", [b, cos])
        turned = (
            nodes.add("Sub", f"{at}.turned_a", [a_cos, b_sin]),
            nodes.add("Add", f"{at}.turned_b", [a_sin, b_cos]),
        )
        if rotation.interleaved:
            return self._woven(at, name, turned, dims)
        return nodes.add("Concat", name, list(turned), {"axis": -1})

    def _looked_up(self, rotation: Rotation) -> _Pair:
        """cos, sin [b, 1, s, dims / 2]"""
        key = (rotation.cos, rotation.positions)
        if key not in self._angles:
            self._angles[key] = (
                self._at_positions(rotation.cos, rotation),
                self._at_positions(rotation.sin, rotation),
            )
        return self._angles[key]

    def _at_positions(self, table: ir.Value, rotation: Rotation) -> ir.Value:
        nodes, name = self._nodes, f"{table.name}.at_{rotation.positions.name}"
        rows = nodes.add("Gather", f"{name}.rows", [table, rotation.positions], {"axis": 0})
        return nodes.add("Unsqueeze", name, [rows, nodes.integers(1)])

    def _pair(self, at: str, x: ir.Value, dims: int, *, interleaved: bool) -> _Pair:
        if interleaved:
            return (
                self._slice(f"{at}.a", x, 0, dims, step=2),
                self._slice(f"{at}.b", x, 1, dims, step=2),
            )
        half = dims // 2
        return self._slice(f"{at}.a", x, 0, half), self._slice(f"{at}.b", x, half, dims)

    def _woven(self, at: str, name: str, pair: _Pair, dims: int) -> ir.Value:
        """[.., dims / 2] twice as [.., dims], their elements taking turns."""
        nodes, last = self._nodes, self._nodes.integers(-1)
        columns = [
            nodes.add("Unsqueeze", f"{at}.column_{part}", [x, last])
            for part, x in zip("ab", pair, strict=True)
        ]
        pairs = nodes.add("Concat", f"{at}.pairs", columns, {"axis": -1})
        return nodes.add("Reshape", name, [pairs, nodes.integers(0, 0, 0, dims)])

    def _slice(self, name: str, x: ir.Value, begin: int, end: int, step: int = 1) -> ir.Value:
        """Of the last axis."""
        nodes = self._nodes
        bounds = [nodes.integers(i) for i in (begin, end, 3, step)]
        return nodes.add("Slice", name, [x, *bounds])
