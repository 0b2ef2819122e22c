"""StableLM 2: LayerNorm, a quarter of each head turns; the large one adds both blocks at once and
normalises each head of q and k by itself.
"""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.decoder import read_plain
from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.naming import PLAIN
from remora_build.families.rope import RopeDefaults
from remora_contract.decoder import DecoderSpec

WORDS = PLAIN.but(
    norms={
        "q_norm": "self_attn.q_layernorm.norms.{head}",
        "k_norm": "self_attn.k_layernorm.norms.{head}",
    }
)


def read(fields: ConfigFields) -> DecoderSpec:
    fields.only("rotary_scaling_factor", 1.0, why="only 1 is carried")
    fields.default("num_key_value_heads", 32)
    spec = replace(
        read_plain(
            fields, FAMILY.model_type, norm_eps="layer_norm_eps", rope=RopeDefaults(partial=0.25)
        ),
        norm="layer",
        norm_bias=True,
        qkv_bias=fields.flag("use_qkv_bias"),
        qk_norm="heads" if fields.flag("qk_layernorm") else "none",
        block="parallel" if fields.flag("use_parallel_residual") else "pre",
    )
    if spec.head_dim * spec.heads != spec.hidden:
        raise fields.invalid("num_attention_heads", "a divisor of hidden_size", spec.heads)
    return spec


FAMILY = Family(
    "stablelm",
    "StableLM 2, StableLM 3B",
    "LayerNorm, partial rotary, q/k norm with a weight a head, parallel residual",
    read,
    (WORDS,),
)
