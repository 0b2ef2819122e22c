"""GLM-4: half of each head turns, neighbours paired; gate and up lie fused in the checkpoint."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.naming import PLAIN
from remora_build.families.rope import RopeDefaults
from remora_contract.decoder import DecoderSpec

WORDS = PLAIN.but({"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"})


def read_glm(fields: ConfigFields, family: str) -> DecoderSpec:
    attention = fields.flag("attention_bias", True)
    fields.default("head_dim", 128)
    fields.default("num_key_value_heads", 2)
    base = read_plain(fields, family, rope=RopeDefaults(partial=0.5, interleaved=True))
    return replace(base, qkv_bias=attention)


def read(fields: ConfigFields) -> DecoderSpec:
    return read_glm(fields, FAMILY.model_type)


FAMILY = Family(
    "glm",
    "GLM-4 (glm-4-9b-hf)",
    "interleaved partial rotary, q, k, v biases, fused gate_up",
    read,
    (WORDS,),
)
