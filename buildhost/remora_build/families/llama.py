"""Llama 3: one `attention_bias` for q, k, v and o, one `mlp_bias`, no q/k norm."""

from __future__ import annotations

from remora_build.families.decoder import Biases, read_decoder
from remora_build.families.fields import ConfigFields
from remora_contract.bundle import DecoderSpec

MODEL_TYPE = "llama"


def read(fields: ConfigFields) -> DecoderSpec:
    attention = fields.flag("attention_bias")
    biases = Biases(qkv=attention, o=attention, mlp=fields.flag("mlp_bias"))
    return read_decoder(fields, MODEL_TYPE, biases=biases, qk_norm="none")
