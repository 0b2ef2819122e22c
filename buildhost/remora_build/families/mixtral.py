"""Mixtral: a Mistral whose layers all mix experts, their weights renormalised."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.experts import stacked
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import read_window
from remora_build.families.mistral import DEFAULT_KV_HEADS
from remora_build.families.naming import PLAIN
from remora_build.families.rope import RopeDefaults
from remora_contract.decoder import MAX_EXPERTS, DecoderSpec, ExpertsSpec, LayerKind

WORDS = PLAIN.but(
    {
        "expert_gate": "block_sparse_moe.experts.{expert}.w1",
        "expert_up": "block_sparse_moe.experts.{expert}.w3",
        "expert_down": "block_sparse_moe.experts.{expert}.w2",
    },
    router="block_sparse_moe.gate",
)


def read(fields: ConfigFields) -> DecoderSpec:
    count = fields.whole("num_local_experts", MAX_EXPERTS)
    active = fields.whole("num_experts_per_tok", count)
    fields.default("num_key_value_heads", DEFAULT_KV_HEADS)
    base = read_plain(fields, FAMILY.model_type, rope=RopeDefaults(theta=1e6))
    window = read_window(fields)
    return replace(
        base,
        experts=ExpertsSpec(count, active, base.intermediate, renormalize=True),
        kinds=(LayerKind(window, experts=True),) * base.layers,
    )


FAMILY = Family(
    "mixtral",
    "Mixtral",
    "experts in every layer, sliding window",
    read,
    (WORDS, stacked(PLAIN.but(router="mlp.gate"))),
)
