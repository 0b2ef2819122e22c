"""Qwen3-MoE: a Qwen3 with experts; all layers slide where a window is switched on."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.experts import SPLIT, mixing_or_plain, read_experts, read_mixing, stacked
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import read_switched_window
from remora_contract.decoder import DecoderSpec, LayerKind


def read(fields: ConfigFields) -> DecoderSpec:
    attention = fields.flag("attention_bias")
    experts = read_experts(fields, "num_experts", "num_local_experts")
    fields.default("num_key_value_heads", 4)
    fields.ignore("max_window_layers", "shared_expert_intermediate_size")
    base, window = read_plain(fields, FAMILY.model_type), read_switched_window(fields)
    return mixing_or_plain(
        replace(
            base,
            qkv_bias=attention,
            o_bias=attention,
            qk_norm="head",
            experts=experts,
            kinds=tuple(LayerKind(window, experts=m) for m in read_mixing(fields, base.layers)),
        )
    )


FAMILY = Family(
    "qwen3_moe", "Qwen3-MoE", "experts, q/k norm of each head", read, (SPLIT, stacked(SPLIT))
)
