"""Qwen3: queries and keys are normalised per head; `attention_bias` covers q, k, v and o."""

from __future__ import annotations

from remora_build.families.decoder import Biases, read_decoder
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_contract.bundle import DecoderSpec

DEFAULT_HEAD_DIM = 128  # transformers' own, whatever hidden_size / heads is


def read(fields: ConfigFields) -> DecoderSpec:
    attention = fields.flag("attention_bias")
    fields.default("head_dim", DEFAULT_HEAD_DIM)
    biases = Biases(attention, attention)
    return read_decoder(fields, FAMILY.model_type, biases=biases, qk_norm="head")


FAMILY = Family("qwen3", "Qwen3", "q/k norm of each head, `attention_bias`", read)
