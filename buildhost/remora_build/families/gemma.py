"""Gemma: (1 + w) norms, embeddings times the root of their width, gelu gating."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_contract.decoder import DecoderSpec

_TANH = "gelu_pytorch_tanh"


def read_gemma(fields: ConfigFields, family: str, *, activation: str) -> DecoderSpec:
    """What all Gemmas share; `activation` is the field that counts in this one."""
    attention = fields.flag("attention_bias")
    fields.default(activation, _TANH)
    fields.default("tie_word_embeddings", True)
    fields.default("head_dim", 256)
    fields.only("use_bidirectional_attention", False, why="only causal attention is carried")
    fields.ignore("cache_implementation")
    base = read_plain(fields, family, activation=activation)
    return replace(
        base,
        qkv_bias=attention,
        o_bias=attention,
        norm_plus_one=True,
        embedding_scale=base.hidden**0.5,
    )


def read(fields: ConfigFields) -> DecoderSpec:
    # The first checkpoints say "gelu" and mean its tanh form, or name that in a field of its own.
    fields.only("hidden_activation", _TANH, why=f"only {_TANH} is carried")
    fields.only("hidden_act", _TANH, "gelu", why=f"only {_TANH} is carried")
    fields.default("num_key_value_heads", 16)
    return read_gemma(fields, FAMILY.model_type, activation="hidden_act")


FAMILY = Family("gemma", "Gemma", "(1 + w) norms, scaled embeddings, gelu", read)
