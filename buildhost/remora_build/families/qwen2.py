"""Qwen2 and Qwen2.5: q, k and v always have biases, o and the MLP never; late layers may slide."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import (
    plain_if_all_plain,
    read_switched_window,
    read_window_layers,
    read_windows,
)
from remora_contract.decoder import DecoderSpec, LayerKind

DEFAULT_FULL_LAYERS = 28  # the first ones, before any may slide
DEFAULT_KV_HEADS = 32


def read_kinds(fields: ConfigFields, layers: int) -> tuple[LayerKind, ...]:
    """From `use_sliding_window`, `sliding_window`, `layer_types` and `max_window_layers`."""
    window = read_switched_window(fields)
    first = read_window_layers(fields, DEFAULT_FULL_LAYERS)
    windows = read_windows(fields, layers, lambda layer: layer >= first, window)
    return plain_if_all_plain([LayerKind(w) for w in windows])


def read(fields: ConfigFields) -> DecoderSpec:
    fields.default("num_key_value_heads", DEFAULT_KV_HEADS)
    base = read_plain(fields, FAMILY.model_type)
    return replace(base, qkv_bias=True, kinds=read_kinds(fields, base.layers))


FAMILY = Family(
    "qwen2", "Qwen2, Qwen2.5; DeepSeek-R1 distills", "q, k, v biases; windows of late layers", read
)
