"""OLMo 2: norms behind the blocks only, queries and keys are normalised over all heads at once."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.naming import PLAIN
from remora_contract.decoder import DecoderSpec

WORDS = PLAIN.but(
    norms={
        "norm_attention_out": "post_attention_layernorm",
        "norm_mlp_out": "post_feedforward_layernorm",
    }
)


def read(fields: ConfigFields) -> DecoderSpec:
    attention = fields.flag("attention_bias")
    base = read_plain(fields, FAMILY.model_type)
    return replace(base, qkv_bias=attention, o_bias=attention, block="post", qk_norm="full")


FAMILY = Family("olmo2", "OLMo 2", "norms behind the blocks, full-width q/k norm", read, (WORDS,))
