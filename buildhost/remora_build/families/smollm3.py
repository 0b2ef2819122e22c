"""SmolLM3: every fourth layer has no rope."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import plain_if_all_plain, read_switched_window, read_windows
from remora_build.families.rope import RopeDefaults
from remora_contract.decoder import MAX_LAYERS, DecoderSpec, LayerKind

DEFAULT_THETA = 2e6


def read(fields: ConfigFields) -> DecoderSpec:
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    fields.default("tie_word_embeddings", True)
    fields.default("num_key_value_heads", 4)
    fields.ignore("max_window_layers")  # `layer_types` and the layers without rope count
    base = read_plain(fields, FAMILY.model_type, rope=RopeDefaults(theta=DEFAULT_THETA))
    turns, window = _turning(fields, base.layers), read_switched_window(fields)
    windows = read_windows(fields, base.layers, lambda layer: not turns[layer], window)
    kinds = [LayerKind(w, "main" if t else "none") for w, t in zip(windows, turns, strict=True)]
    return replace(
        base,
        qkv_bias=attention,
        o_bias=attention,
        mlp_bias=mlp,
        kinds=plain_if_all_plain(kinds),
    )


def _turning(fields: ConfigFields, layers: int) -> tuple[bool, ...]:
    """Which layers have rope: `no_rope_layers` says 1 for those that do."""
    interval = fields.whole("no_rope_layer_interval", MAX_LAYERS, 4)
    listed: Any = fields.take("no_rope_layers")
    if listed is None:
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if (
        not isinstance(listed, list)
        or len(listed) < layers
        or not all(type(turns) is int and turns in (0, 1) for turns in listed)
    ):
        raise fields.invalid("no_rope_layers", f"{layers} times 0 or 1", listed)
    return tuple(bool(turns) for turns in listed[:layers])


FAMILY = Family("smollm3", "SmolLM3", "layers without rope", read)
