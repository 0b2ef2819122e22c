"""Mistral: a Llama without biases whose layers all look back one sliding window."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import every_layer, read_window
from remora_contract.decoder import DecoderSpec

# What absent fields mean; null means no window, and as many heads as queries have.
DEFAULT_WINDOW, DEFAULT_KV_HEADS = 4096, 8


def read(fields: ConfigFields) -> DecoderSpec:
    fields.default("sliding_window", DEFAULT_WINDOW)
    fields.default("num_key_value_heads", DEFAULT_KV_HEADS)
    if fields.left().get("layer_types"):
        raise fields.unsupported(
            "layer_types", "given", "a mistral ignores it; ministral alternates windows"
        )
    base = read_plain(fields, FAMILY.model_type)
    return replace(base, kinds=every_layer(read_window(fields), base.layers))


FAMILY = Family("mistral", "Mistral", "sliding window in every layer", read)
