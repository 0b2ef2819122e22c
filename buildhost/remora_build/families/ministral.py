"""Ministral 8B: a Mistral whose `layer_types` say which layers slide."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import plain_if_all_plain, read_window, read_windows
from remora_build.families.mistral import DEFAULT_KV_HEADS, DEFAULT_WINDOW
from remora_contract.decoder import DecoderSpec, LayerKind


def read(fields: ConfigFields) -> DecoderSpec:
    fields.default("sliding_window", DEFAULT_WINDOW)
    fields.default("num_key_value_heads", DEFAULT_KV_HEADS)
    base, window = read_plain(fields, FAMILY.model_type), read_window(fields)
    windows = read_windows(fields, base.layers, lambda layer: True, window)
    return replace(base, kinds=plain_if_all_plain([LayerKind(w) for w in windows]))


FAMILY = Family("ministral", "Ministral 8B", "windows of some layers", read)
