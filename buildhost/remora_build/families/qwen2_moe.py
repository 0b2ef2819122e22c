"""Qwen2-MoE: a Qwen2 with experts and one more that every token takes, weighted by a gate."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.experts import SPLIT, mixing_or_plain, read_experts, read_mixing, stacked
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import read_switched_window, read_window_layers, read_windows
from remora_contract.decoder import MAX_WIDTH, DecoderSpec, LayerKind

DEFAULT_WINDOWED_LAYERS = 28  # the first ones, of which every other slides


def read(fields: ConfigFields) -> DecoderSpec:
    qkv_bias = fields.flag("qkv_bias", True)
    experts = read_experts(fields, "num_experts")
    shared = fields.whole("shared_expert_intermediate_size", MAX_WIDTH)
    fields.default("num_key_value_heads", 16)
    base, window = read_plain(fields, FAMILY.model_type), read_switched_window(fields)
    last = read_window_layers(fields, DEFAULT_WINDOWED_LAYERS)
    windows = read_windows(
        fields, base.layers, lambda layer: layer < last and layer % 2 == 0, window
    )
    mixing = read_mixing(fields, base.layers)
    return mixing_or_plain(
        replace(
            base,
            qkv_bias=qkv_bias,
            experts=replace(experts, shared_intermediate=shared, shared_gate=True),
            kinds=tuple(LayerKind(w, experts=m) for w, m in zip(windows, mixing, strict=True)),
        )
    )


FAMILY = Family(
    "qwen2_moe",
    "Qwen1.5-MoE, Qwen2-MoE",
    "experts and a gated shared one, q, k, v biases",
    read,
    (SPLIT, stacked(SPLIT)),
)
