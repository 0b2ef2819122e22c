"""GLM-4-0414: a GLM with norms before and behind each block."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families import glm
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_contract.decoder import DecoderSpec

WORDS = glm.WORDS.but(
    norms={
        "norm_attention_out": "post_self_attn_layernorm",
        "norm_mlp_out": "post_mlp_layernorm",
    }
)


def read(fields: ConfigFields) -> DecoderSpec:
    return replace(glm.read_glm(fields, FAMILY.model_type), block="sandwich")


FAMILY = Family("glm4", "GLM-4-0414, GLM-Z1", "as glm; norms behind the blocks too", read, (WORDS,))
