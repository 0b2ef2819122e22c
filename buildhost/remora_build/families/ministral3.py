"""Ministral 3: yarn rope, and queries grow with the logarithm of their position."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import every_layer, read_window
from remora_build.families.mistral import DEFAULT_KV_HEADS
from remora_contract.decoder import DecoderSpec, QueryScale

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def read(fields: ConfigFields) -> DecoderSpec:
    fields.default("head_dim", 128)
    fields.default("num_key_value_heads", DEFAULT_KV_HEADS)
    fields.default("rope_parameters", dict(_YARN))
    table = fields.nested("rope_parameters")
    table.ignore("max_position_embeddings")  # repeats the field of the same name
    beta = table.positive("llama_4_scaling_beta")
    fields.default("rope_parameters", table.left())
    base = read_plain(fields, FAMILY.model_type)
    if base.rope.original_context is None:
        raise fields.unsupported("rope type", base.rope.scaling, "queries scale by yarn's context")
    return replace(
        base,
        query_scale=QueryScale(beta, base.rope.original_context),
        kinds=every_layer(read_window(fields), base.layers),
    )


FAMILY = Family("ministral3", "Ministral 3", "yarn, queries scaled by position", read)
