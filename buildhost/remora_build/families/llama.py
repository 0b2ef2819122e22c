"""Llama 2 and 3: one `attention_bias` for q, k, v and o, one `mlp_bias`, no q/k norm."""

from __future__ import annotations

from remora_build.families.decoder import Biases, read_decoder
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_contract.bundle import DecoderSpec


def read(fields: ConfigFields) -> DecoderSpec:
    attention = fields.flag("attention_bias")
    biases = Biases(qkv=attention, o=attention, mlp=fields.flag("mlp_bias"))
    return read_decoder(fields, FAMILY.model_type, biases=biases, qk_norm="none")


FAMILY = Family(
    "llama",
    "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2, Falcon 3, DeepSeek-R1 distills",
    "`attention_bias`, `mlp_bias`",
    read,
)
