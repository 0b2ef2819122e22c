"""The nodes that cut one expert's matrix [k, n] out of the stack of all, then dequantize it.

`stacks` says how int4 codes lie in words; only the words of one expert are taken apart.
"""

from __future__ import annotations

import onnx_ir as ir

from remora_build.graph import layout
from remora_build.graph.kit import Kit
from remora_build.graph.nodes import IR_DTYPE, Nodes
from remora_build.graph.stacks import CODE_OFFSET, CODES_A_HALF, HALF
from remora_contract.targets import Group


class ExpertWeights:
    """Adds the nodes that give one expert's matrix, in the body of the loop over tiles."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def of(self, nodes: Nodes, layer: int, group: Group, expert: ir.Value) -> ir.Value:
        """[k, n] in the graph's dtype."""
        name, at = layout.group_weight(layer, group), f"layers.{layer}.{group}"
        k, n = layout.group_in(self._kit.spec, group), layout.group_out(self._kit.spec, group)
        block = self._kit.graph.quant.block
        if block is None:
            stack = nodes.weight(name)
            own = nodes.add("Gather", f"{at}.of_expert", [stack, expert], {"axis": 0})
            # ONNX Runtime's CPU casts the whole float16 stack if a product reads the cut at once.
            return nodes.add("Reshape", f"{at}.matrix", [own, nodes.integers(k, n)])
        stored = (("words", layout.codes(name)), ("scales", layout.scales(name)))
        words, scales = (
            nodes.add("Gather", f"{at}.{what}", [nodes.weight(of), expert], {"axis": 0})
            for what, of in stored
        )
        codes = self._unpacked(nodes, at, words)  # [2, 4, k / 8, n]
        blocks = nodes.add("Reshape", f"{at}.blocks", [codes, nodes.integers(k // block, block, n)])
        factors = nodes.add("Unsqueeze", f"{at}.factors", [scales, nodes.integers(1)])
        scaled = nodes.add("Mul", f"{at}.dequantize", [blocks, factors])
        return nodes.add("Reshape", f"{at}.matrix", [scaled, nodes.integers(k, n)])

    def _unpacked(self, nodes: Nodes, at: str, words: ir.Value) -> ir.Value:
        """Both halves of a word in float32, which holds them exactly; code j of a half is the whole
        part of 16 times the fraction of half / 16^(j + 1), less the offset."""
        half = nodes.number(HALF, "int32")
        low = nodes.add("Mod", f"{at}.low", [words, half])
        rest = nodes.add("Sub", f"{at}.rest", [words, low])
        high = nodes.add("Div", f"{at}.high", [rest, half])  # negative ones have the same fraction
        rows = [
            nodes.add("Unsqueeze", f"{at}.{name}_row", [value, nodes.integers(0, 1)])
            for name, value in (("low", low), ("high", high))
        ]
        halves = nodes.add("Concat", f"{at}.halves", rows, {"axis": 0})
        wide = nodes.add("Cast", f"{at}.wide", [halves], {"to": ir.DataType.FLOAT})
        powers = nodes.column([16.0 ** -(j + 1) for j in range(CODES_A_HALF)])
        ratio = nodes.add("Mul", f"{at}.ratio", [wide, powers])
        whole = nodes.add("Floor", f"{at}.whole", [ratio])
        fraction = nodes.add("Sub", f"{at}.fraction", [ratio, whole])
        scaled = nodes.add("Mul", f"{at}.sixteenths", [fraction, nodes.number(16.0, "float32")])
        digits = nodes.add("Floor", f"{at}.digits", [scaled])
        offset = nodes.number(float(CODE_OFFSET), "float32")
        codes = nodes.add("Sub", f"{at}.codes", [digits, offset])
        if self._kit.graph.dtype == "float32":
            return codes
        return nodes.add("Cast", f"{at}.float_codes", [codes], {"to": IR_DTYPE["float16"]})
