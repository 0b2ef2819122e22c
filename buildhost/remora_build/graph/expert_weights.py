"""The nodes that cut one expert's matrix [k, n] out of the stack of all, then dequantize it.

`stacks` says how int4 codes lie in words; only the words of one expert are taken apart.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.kit import Kit
from remora_build.graph.nodes import IR_DTYPE, Nodes
from remora_build.graph.stacks import CODE_OFFSET, LOW_CODES, TOP
from remora_contract.targets import Group


class ExpertWeights:
    """Adds the nodes that give one expert's matrix, in the body of the loop over tiles."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def of(self, nodes: Nodes, layer: int, group: Group, expert: ir.Value) -> ir.Value:
        """[k, n] in the graph's dtype."""
        name, at = layout.group_weight(layer, group), f"layers.{layer}.{group}"
        block = self._kit.graph.quant.block
        if block is None:
            return nodes.add("Gather", f"{at}.of_expert", [nodes.weight(name), expert], {"axis": 0})
        stored = (("words", layout.codes(name)), ("scales", layout.scales(name)))
        words, scales = (
            nodes.add("Gather", f"{at}.{what}", [nodes.weight(of), expert], {"axis": 0})
            for what, of in stored
        )
        k, n = layout.group_in(self._kit.spec, group), layout.group_out(self._kit.spec, group)
        codes = self._unpacked(nodes, at, words)  # [8, k / 8, n]
        blocks = nodes.add("Reshape", f"{at}.blocks", [codes, nodes.integers(k // block, block, n)])
        factors = nodes.add("Unsqueeze", f"{at}.factors", [scales, nodes.integers(1)])
        scaled = nodes.add("Mul", f"{at}.dequantize", [blocks, factors])
        return nodes.add("Reshape", f"{at}.matrix", [scaled, nodes.integers(k, n)])

    def _unpacked(self, nodes: Nodes, at: str, words: ir.Value) -> ir.Value:
        stacked = nodes.add("Unsqueeze", f"{at}.word", [words, nodes.integers(0)])
        moduli = nodes.words([16 ** (j + 1) for j in range(LOW_CODES)])
        divisors = nodes.words([16**j for j in range(LOW_CODES)])
        upto = nodes.add("Mod", f"{at}.upto", [stacked, moduli])
        low = nodes.add("Div", f"{at}.low", [upto, divisors])
        codes = nodes.add("Sub", f"{at}.low_codes", [low, nodes.words([CODE_OFFSET])])
        rest = nodes.add("Mod", f"{at}.rest", [stacked, nodes.words([TOP])])
        above = nodes.add("Sub", f"{at}.above", [stacked, rest])
        top = nodes.add("Div", f"{at}.top_code", [above, nodes.words([TOP])])
        joined = nodes.add("Concat", f"{at}.codes", [codes, top], {"axis": 0})
        to = {"to": IR_DTYPE[self._kit.graph.dtype]}
        return nodes.add("Cast", f"{at}.float_codes", [joined], to)
