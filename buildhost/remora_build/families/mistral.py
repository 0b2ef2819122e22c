"""Mistral: a Llama without biases whose layers all look back one sliding window."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import every_layer, read_window
from remora_contract.decoder import DecoderSpec

DEFAULT_WINDOW = 4096  # an absent field means this, null means none


def read(fields: ConfigFields) -> DecoderSpec:
    fields.default("sliding_window", DEFAULT_WINDOW)
    if fields.left().get("layer_types"):
        raise fields.unsupported(
            "layer_types", "given", "a mistral ignores it; ministral alternates windows"
        )
    base = read_plain(fields, FAMILY.model_type)
    return replace(base, kinds=every_layer(read_window(fields), base.layers))


FAMILY = Family("mistral", "Mistral", "sliding window in every layer", read)
