"""Gemma 3 text: sliding layers turn by a rope of their own, queries and keys are normalised."""

from __future__ import annotations

from dataclasses import replace

from remora_build.families.family import Family
from remora_build.families.fields import ConfigFields
from remora_build.families.gemma2 import WORDS, read_sandwich
from remora_build.families.kinds import FULL, SLIDING, plain_if_all_plain
from remora_build.families.rope import RopeDefaults, read_table
from remora_contract.decoder import MAX_LAYERS, DecoderSpec, LayerKind

# What a nested text_config leaves out.
DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
}


def read(fields: ConfigFields) -> DecoderSpec:
    main, local = _rope_tables(fields)
    pattern = fields.whole("sliding_window_pattern", MAX_LAYERS, 6)
    fields.ignore("_sliding_window_pattern")  # a note of transformers beside `layer_types`
    fields.only("attn_logit_softcapping", None, why="a gemma3 computes without, whatever it says")
    spec, windows = read_sandwich(
        fields, FAMILY.model_type, lambda layer: (layer + 1) % pattern != 0
    )
    size = (spec.head_dim, spec.max_position)
    kinds = [LayerKind(w, "main" if w is None else "local") for w in windows]
    ropes = [read_table(table, *size, RopeDefaults()) for table in (main, local)]
    if "longrope" in (rope.scaling for rope in ropes):
        why = "not carried in a model of two ropes"
        raise fields.unsupported("rope type", "longrope", why)
    return replace(
        spec,
        qk_norm="head",
        rope=ropes[0],
        local_rope=ropes[1],
        kinds=plain_if_all_plain(kinds),
    )


def _rope_tables(fields: ConfigFields) -> tuple[ConfigFields, ConfigFields]:
    """Of full and of sliding layers, in the words of transformers 5 or 4."""
    both = fields.nested("rope_parameters")
    main, local = both.nested(FULL), both.nested(SLIDING)
    both.finish()
    scaling = fields.nested("rope_scaling").left()
    for key, value in scaling.items():
        main.default(key, value)
    for table in (main, local):
        table.only("truncate", True, why="transformers overlooks it in a kind of layer's table")
    main.default("rope_theta", fields.take("rope_theta", 1e6))
    local.default("rope_theta", fields.take("rope_local_base_freq", 1e4))
    return main, local


FAMILY = Family(
    "gemma3_text",
    "Gemma 3 (text; also out of the multimodal `gemma3`)",
    "as Gemma 2 without soft-capping; q/k norm, a rope of its own for sliding layers",
    read,
    (WORDS,),
)
