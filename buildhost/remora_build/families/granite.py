"""Granite 3: multipliers of embeddings, scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_contract.decoder import DecoderSpec


def read(fields: ConfigFields) -> DecoderSpec:
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    spec = replace(
        read_plain(fields, FAMILY.model_type),
        qkv_bias=attention,
        o_bias=attention,
        mlp_bias=mlp,
    )
    return replace(
        spec,
        embedding_scale=fields.positive("embedding_multiplier", 1.0),
        attention_scale=fields.positive("attention_multiplier", 1.0),
        residual_scale=fields.positive("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.positive("logits_scaling", 1.0),
    )


FAMILY = Family(
    "granite", "Granite 3", "multipliers of embeddings, scores, residuals and logits", read
)
