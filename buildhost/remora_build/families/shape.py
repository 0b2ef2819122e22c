"""What a DecoderSpec implies for the tensors of one layer: which biases, which norms, how wide.
Pure.
"""

from __future__ import annotations

from typing import Literal

from remora_contract.decoder import DecoderSpec
from remora_contract.targets import ALL_GROUPS, PARTS, Group, Projection

# `_out` norms stand behind what a block computes, before it is added to the stream.
Norm = Literal[
    "norm_attention", "norm_attention_out", "norm_mlp", "norm_mlp_out", "q_norm", "k_norm"
]
_PLACED: dict[str, tuple[Norm, ...]] = {
    "pre": ("norm_attention", "norm_mlp"),
    "post": ("norm_attention_out", "norm_mlp_out"),
    "sandwich": ("norm_attention", "norm_attention_out", "norm_mlp", "norm_mlp_out"),
    "parallel": ("norm_attention",),
}


def used_groups(spec: DecoderSpec) -> tuple[Group, ...]:
    """The packed projections that some layer has."""
    used = {group for layer in range(spec.layers) for group in spec.groups(layer)}
    return tuple(group for group in ALL_GROUPS if group in used)


def used_projections(spec: DecoderSpec) -> tuple[Projection, ...]:
    return tuple(projection for group in used_groups(spec) for projection in PARTS[group])


def has_bias(spec: DecoderSpec, projection: Projection) -> bool:
    if projection in ("q", "k", "v"):
        return spec.qkv_bias
    if projection == "o":
        return spec.o_bias
    return spec.mlp_bias and projection in ("gate", "up", "down")


def has_norm_bias(spec: DecoderSpec, norm: Norm) -> bool:
    return spec.norm_bias and norm not in ("q_norm", "k_norm")


def layer_norms(spec: DecoderSpec) -> dict[Norm, tuple[int, ...]]:
    """The norms of a layer and their weights' shapes."""
    norms: dict[Norm, tuple[int, ...]] = dict.fromkeys(_PLACED[spec.block], (spec.hidden,))
    if spec.qk_norm != "none":
        norms["q_norm"] = _qk_shape(spec, spec.heads)
        norms["k_norm"] = _qk_shape(spec, spec.kv_heads)
    return norms


def _qk_shape(spec: DecoderSpec, heads: int) -> tuple[int, ...]:
    shapes = {
        "head": (spec.head_dim,),
        "full": (heads * spec.head_dim,),
        "heads": (heads, spec.head_dim),
    }
    return shapes[spec.qk_norm]
