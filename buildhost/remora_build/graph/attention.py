"""A layer's attention: packed projection, q/k norms, rope, cache, scores, output."""

from __future__ import annotations

import onnx_ir as ir

from remora_build.families.shape import Norm
from remora_build.graph.kit import Kit
from remora_build.graph.steps import Inputs, Steps, effective_window
from remora_contract import targets
from remora_contract.targets import PARTS, Projection

_HEADS_FIRST = {"perm": [0, 2, 1, 3]}


class Attention:
    """Calls are layers: `attention(layer, x [b, s, hidden]) -> [b, s, hidden], (key, value)`."""

    def __init__(self, kit: Kit, inputs: Inputs, steps: Steps) -> None:
        self._kit = kit
        self._inputs = inputs
        self._steps = steps

    def __call__(self, layer: int, x: ir.Value) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        kit, spec, at = self._kit, self._kit.spec, f"layers.{layer}"
        q, k, v = kit.parts(kit.linear(layer, "qkv", x), layer, PARTS["qkv"])
        query = self._rotated(layer, "q", self._normed(layer, "q", q, spec.heads))
        new_key = self._rotated(layer, "k", self._normed(layer, "k", k, spec.kv_heads))
        new_value = self._swapped(layer, "v", self._heads(layer, "v", v, spec.kv_heads))
        past_key, past_value = self._inputs.pasts[layer]
        key = self._written(f"{at}.k", past_key, new_key, targets.present_key(layer))
        value = self._written(f"{at}.v", past_value, new_value, targets.present_value(layer))
        mixed = kit.ops.attend(
            f"{at}.attention",
            self._scaled(layer, query),
            key,
            value,
            self._steps.masks[effective_window(spec.kind(layer), kit.graph)],
            scale=spec.attention_scale or float(spec.head_dim) ** -0.5,
            softcap=spec.attention_softcap,
        )
        swapped = kit.nodes.add("Transpose", f"{at}.attention.transpose", [mixed], _HEADS_FIRST)
        shape = kit.nodes.integers(0, 0, spec.heads * spec.head_dim)
        merged = kit.nodes.add("Reshape", f"{at}.attention.merge", [swapped, shape])
        return kit.linear(layer, "o", merged), (key, value)

    def _normed(self, layer: int, part: Projection, x: ir.Value, heads: int) -> ir.Value:
        """[b, s, heads, head_dim]"""
        norm: Norm = "q_norm" if part == "q" else "k_norm"
        if self._kit.spec.qk_norm == "full":
            x = self._kit.layer_norm(layer, norm, x)
        x = self._heads(layer, part, x, heads)
        if self._kit.spec.qk_norm in ("head", "heads"):
            x = self._kit.layer_norm(layer, norm, x)
        return x

    def _heads(self, layer: int, part: Projection, x: ir.Value, heads: int) -> ir.Value:
        """[b, s, heads, head_dim]"""
        nodes = self._kit.nodes
        shape = nodes.integers(0, 0, heads, self._kit.spec.head_dim)
        return nodes.add("Reshape", f"layers.{layer}.{part}.heads", [x, shape])

    def _swapped(self, layer: int, part: Projection, x: ir.Value) -> ir.Value:
        """[b, heads, s, head_dim]"""
        name = f"layers.{layer}.{part}.transpose"
        return self._kit.nodes.add("Transpose", name, [x], _HEADS_FIRST)

    def _rotated(self, layer: int, part: Projection, x: ir.Value) -> ir.Value:
        swapped, rope = self._swapped(layer, part, x), self._kit.spec.kind(layer).rope
        if rope == "none":
            return swapped
        name = f"layers.{layer}.{part}.rope"
        return self._kit.ops.rotate(name, swapped, self._steps.rotations[rope])

    def _scaled(self, layer: int, query: ir.Value) -> ir.Value:
        """Queries grown by their position, where the decoder does that."""
        factor = self._steps.query_scale
        if factor is None:
            return query
        return self._kit.nodes.add("Mul", f"layers.{layer}.q.scaled", [query, factor])

    def _written(self, at: str, past: ir.Value, new: ir.Value, present: str) -> ir.Value:
        index = self._steps.cache_index
        return self._kit.ops.write_cache(f"{at}.scatter", past, new, index, output=present)
