"""Phi-3, Phi-3.5 and Phi-4-mini: q, k, v and gate, up lie fused in the checkpoint; longrope."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.kinds import every_layer, read_window
from remora_build.families.naming import PLAIN
from remora_build.families.rope import RopeDefaults
from remora_contract.decoder import MAX_POSITION, DecoderSpec

DEFAULT_ORIGINAL = 4096
WORDS = PLAIN.but(
    {
        "q": "self_attn.qkv_proj",
        "k": "self_attn.qkv_proj",
        "v": "self_attn.qkv_proj",
        "gate": "mlp.gate_up_proj",
        "up": "mlp.gate_up_proj",
    }
)


def read(fields: ConfigFields) -> DecoderSpec:
    original = fields.whole("original_max_position_embeddings", MAX_POSITION, DEFAULT_ORIGINAL)
    for key in ("full_attn_mod", "interpolate_factor"):
        fields.only(key, 1, why="only 1 is carried")
    base = read_plain(fields, FAMILY.model_type, rope=RopeDefaults(partial=1.0, original=original))
    if base.rope.scaling not in ("none", "longrope"):
        raise fields.unsupported("rope type", base.rope.scaling, "a phi3 scales by longrope only")
    return replace(base, kinds=every_layer(read_window(fields), base.layers))


FAMILY = Family(
    "phi3",
    "Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
    "fused qkv and gate_up, partial rotary, longrope, sliding window",
    read,
    (WORDS,),
)
