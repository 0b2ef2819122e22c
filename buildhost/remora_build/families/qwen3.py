"""Qwen3: queries and keys are normalised per head; `attention_bias` covers q, k, v and o."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.qwen2 import DEFAULT_KV_HEADS, read_kinds
from remora_contract.decoder import DecoderSpec

DEFAULT_HEAD_DIM = 128  # transformers' own, whatever hidden_size / heads is


def read(fields: ConfigFields) -> DecoderSpec:
    attention = fields.flag("attention_bias")
    fields.default("head_dim", DEFAULT_HEAD_DIM)
    fields.default("num_key_value_heads", DEFAULT_KV_HEADS)
    base = read_plain(fields, FAMILY.model_type)
    return replace(
        base,
        qkv_bias=attention,
        o_bias=attention,
        qk_norm="head",
        kinds=read_kinds(fields, base.layers),
    )


FAMILY = Family(
    "qwen3", "Qwen3", "q/k norm of each head, `attention_bias`, windows of late layers", read
)
