"""What the supported families share: one decoder shape, read from the fields of one config.json.
Pure.

A family's file reads the plain decoder here and replaces what is its own.
"""

from __future__ import annotations

from typing import Literal

from remora_build.families.fields import ConfigFields
from remora_build.families.rope import RopeDefaults, read_rope
from remora_contract.decoder import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    MAX_WIDTH,
    DecoderSpec,
)

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def read_plain(
    fields: ConfigFields,
    family: str,
    *,
    norm_eps: str = "rms_norm_eps",
    activation: str = "hidden_act",
    rope: RopeDefaults = RopeDefaults(),
) -> DecoderSpec:
    """A decoder without any variant, from the fields that every family has; `norm_eps` and
    `activation` are the fields' names.

    Raises CheckpointInvalid for a missing or impossible number, Unsupported for what changes the
    computation and is not carried.
    """
    hidden = fields.whole("hidden_size", MAX_WIDTH)
    heads = fields.whole("num_attention_heads", MAX_HEADS)
    kv_heads = fields.whole("num_key_value_heads", heads, default=heads)
    if heads % kv_heads:
        raise fields.invalid("num_key_value_heads", f"a divisor of {heads}", kv_heads)
    fields.only("is_causal", True, why="only causal attention is carried")
    fields.take("quantization_config")  # remora_build.quantized reads it, or read_config refuses it
    head_dim = _head_dim(fields, hidden, heads)
    max_position = fields.whole("max_position_embeddings", MAX_POSITION)
    return DecoderSpec(
        family=family,
        layers=fields.whole("num_hidden_layers", MAX_LAYERS),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=fields.whole("intermediate_size", MAX_WIDTH),
        vocab=fields.whole("vocab_size", MAX_VOCAB),
        norm_eps=fields.positive(norm_eps),
        rope=read_rope(fields, head_dim, max_position, rope),
        activation=_activation(fields, activation),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        max_position=max_position,
    )


def _head_dim(fields: ConfigFields, hidden: int, heads: int) -> int:
    head_dim = fields.whole("head_dim", MAX_HEAD_DIM, default=hidden // heads)
    if head_dim % 2:
        raise fields.invalid("head_dim", "even, as rotary embedding needs", head_dim)
    return head_dim


def _activation(fields: ConfigFields, key: str) -> Activation:
    name = fields.take(key, "silu")
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise fields.unsupported(key, name, f"carried are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
