"""Llama 2 and 3: one `attention_bias` for q, k, v and o, one `mlp_bias`, no q/k norm."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_contract.decoder import DecoderSpec


def read(fields: ConfigFields) -> DecoderSpec:
    attention, mlp = fields.flag("attention_bias"), fields.flag("mlp_bias")
    # Words of derived models' configs that say what a Llama is anyway.
    fields.only("is_llama_config", True, why="it is read as one")
    fields.only("activation", "swiglu", why="only silu gating is carried")
    # A Llama never slides, whatever its config carries along.
    fields.only("use_sliding_window", False, why="a llama has no sliding window")
    fields.ignore("sliding_window", "max_window_layers", "transformers.js_config")
    base = read_plain(fields, FAMILY.model_type)
    return replace(base, qkv_bias=attention, o_bias=attention, mlp_bias=mlp)


FAMILY = Family(
    "llama",
    "Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2, Falcon 3, DeepSeek-R1 distills",
    "`attention_bias`, `mlp_bias`",
    read,
)
