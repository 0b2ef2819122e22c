"""Gemma 2: norms before and behind each block, soft-capped scores and logits, every other layer
slides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.gemma import read_gemma
from remora_build.families.kinds import plain_if_all_plain, read_window, read_windows
from remora_build.families.naming import PLAIN
from remora_contract.decoder import DecoderSpec, LayerKind

DEFAULT_WINDOW = 4096
WORDS = PLAIN.but(
    norms={
        "norm_attention_out": "post_attention_layernorm",
        "norm_mlp": "pre_feedforward_layernorm",
        "norm_mlp_out": "post_feedforward_layernorm",
    }
)


def read_sandwich(
    fields: ConfigFields, family: str, slides: Callable[[int], bool]
) -> tuple[DecoderSpec, tuple[int | None, ...]]:
    """What Gemma 2 and 3 share, and each layer's window."""
    fields.default("sliding_window", DEFAULT_WINDOW)
    fields.default("num_key_value_heads", 4)
    fields.ignore("hidden_act")  # `hidden_activation` counts
    query = fields.positive("query_pre_attn_scalar", 256.0)
    caps = [fields.maybe_positive(f"{of}_logit_softcapping") for of in ("attn", "final")]
    base = read_gemma(fields, family, activation="hidden_activation")
    spec = replace(
        base,
        block="sandwich",
        attention_scale=query**-0.5,
        attention_softcap=caps[0],
        logit_softcap=caps[1],
    )
    return spec, read_windows(fields, base.layers, slides, read_window(fields))


def read(fields: ConfigFields) -> DecoderSpec:
    fields.default("attn_logit_softcapping", 50.0)
    fields.default("final_logit_softcapping", 30.0)
    spec, windows = read_sandwich(fields, FAMILY.model_type, lambda layer: layer % 2 == 0)
    return replace(spec, kinds=plain_if_all_plain([LayerKind(w) for w in windows]))


FAMILY = Family(
    "gemma2",
    "Gemma 2",
    "as Gemma; norms behind the blocks too, soft-capping, windows of every other layer",
    read,
    (WORDS,),
)
