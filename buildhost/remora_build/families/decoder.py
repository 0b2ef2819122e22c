"""What the supported families share: one decoder shape and one naming of tensors. Pure.

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
from remora_contract.targets import PROJECTIONS, Projection

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
# Of a projection, inside its decoder layer.
MODULE_OF: dict[Projection, str] = {
    p: f"{'mlp' if p in ('gate', 'up', 'down') else 'self_attn'}.{p}_proj" for p in PROJECTIONS
}


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


def weight_name(layer: int, projection: Projection) -> str:
    """Weight [n, k] in the checkpoint."""
    return f"model.layers.{layer}.{MODULE_OF[projection]}.weight"


def bias_name(layer: int, projection: Projection) -> str:
    """Bias [n] in the checkpoint."""
    return f"model.layers.{layer}.{MODULE_OF[projection]}.bias"


Norm = Literal["norm_attention", "norm_mlp", "q_norm", "k_norm"]
_NORM: dict[Norm, str] = {
    "norm_attention": "input_layernorm",
    "norm_mlp": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def norm_name(layer: int, norm: Norm) -> str:
    return f"model.layers.{layer}.{_NORM[norm]}.weight"


def has_bias(spec: DecoderSpec, projection: Projection) -> bool:
    if projection in ("q", "k", "v"):
        return spec.qkv_bias
    return spec.o_bias if projection == "o" else spec.mlp_bias


def layer_norms(spec: DecoderSpec) -> dict[Norm, int]:
    """The norms of a layer and their widths."""
    norms: dict[Norm, int] = {"norm_attention": spec.hidden, "norm_mlp": spec.hidden}
    if spec.qk_norm != "none":
        norms |= {"q_norm": spec.head_dim, "k_norm": spec.head_dim}
    return norms


def expected_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of this shape holds."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        shapes |= {norm_name(layer, norm): (n,) for norm, n in layer_norms(spec).items()}
        for p in PROJECTIONS:
            n, k = spec.out_features(p), spec.in_features(p)
            shapes[weight_name(layer, p)] = (n, k)
            if has_bias(spec, p):
                shapes[bias_name(layer, p)] = (n,)
    shapes[FINAL_NORM] = (spec.hidden,)
    if not spec.tied_embeddings:
        shapes[HEAD] = (spec.vocab, spec.hidden)
    return shapes
