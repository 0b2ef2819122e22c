"""What the supported families share: one decoder shape, read from the fields of one config.json.
Pure.

A family's file says only what is its own: which projections have biases, whether queries and keys
are normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from remora_build.families.fields import ConfigFields
from remora_build.families.rope import read_rope
from remora_contract.bundle import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    MAX_WIDTH,
    DecoderSpec,
)


@dataclass(frozen=True)
class Biases:
    qkv: bool = False
    o: bool = False
    mlp: bool = False


def read_decoder(
    fields: ConfigFields, family: str, *, biases: Biases, qk_norm: Literal["none", "head"]
) -> DecoderSpec:
    """Takes every field the shape depends on and refuses the rest.

    Raises CheckpointInvalid for a missing or impossible number, Unsupported for what changes the
    computation and is not carried.
    """
    hidden = fields.whole("hidden_size", MAX_WIDTH)
    heads = fields.whole("num_attention_heads", MAX_HEADS)
    kv_heads = fields.whole("num_key_value_heads", heads, default=heads)
    if heads % kv_heads:
        raise fields.invalid("num_key_value_heads", f"a divisor of {heads}", kv_heads)
    _refuse_variants(fields)
    spec = DecoderSpec(
        family=family,
        layers=fields.whole("num_hidden_layers", MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_head_dim(fields, hidden, heads),
        intermediate=fields.whole("intermediate_size", MAX_WIDTH),
        vocab=fields.whole("vocab_size", MAX_VOCAB),
        norm_eps=fields.positive("rms_norm_eps"),
        rope=read_rope(fields),
        qkv_bias=biases.qkv,
        o_bias=biases.o,
        mlp_bias=biases.mlp,
        qk_norm=qk_norm,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        max_position=fields.whole("max_position_embeddings", MAX_POSITION),
    )
    fields.finish()
    return spec


def _head_dim(fields: ConfigFields, hidden: int, heads: int) -> int:
    head_dim = fields.whole("head_dim", MAX_HEAD_DIM, default=hidden // heads)
    if head_dim % 2:
        raise fields.invalid("head_dim", "even, as rotary embedding needs", head_dim)
    return head_dim


def _refuse_variants(fields: ConfigFields) -> None:
    quantized = fields.take("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise fields.unsupported(
            "quantization_config", method, "export the original checkpoint; remora quantizes itself"
        )
    fields.only("hidden_act", "silu", "swish", why="only silu is carried")
    fields.only("use_sliding_window", False, why="sliding window attention is not carried")
    fields.take("sliding_window")  # read only beside what is refused above and below
    layer_types = fields.take("layer_types", [])
    if not isinstance(layer_types, list) or set(map(str, layer_types)) - {"full_attention"}:
        raise fields.unsupported("layer_types", layer_types, "only full attention is carried")
