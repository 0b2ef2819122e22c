"""config.json is honoured field by field or refused by the field's name."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from remora_build.families import FAMILIES, naming, read_config
from remora_build.families.wrappers import WRAPPERS
from remora_build.graph.rope import inverse_frequencies, tables
from remora_contract.decoder import ExpertsSpec, LayerKind, RopeSpec
from remora_contract.errors import CheckpointInvalid, Unsupported
from tests.buildhost.published_configs import PUBLISHED
from tests.support.checkpoints import LLAMA3_SCALING, LONGROPE_SCALING, YARN_SCALING

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 5e5,
}


def read(tmp_path: Path, **changes):
    config = {k: v for k, v in (BASE | changes).items() if v != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return read_config(tmp_path)


def test_absent_fields_mean_what_they_mean_in_the_family(tmp_path):
    spec = read(tmp_path, num_key_value_heads="absent")
    assert (spec.kv_heads, spec.head_dim, spec.tied_embeddings) == (4, 16, False)
    assert spec.rope == RopeSpec(theta=5e5)
    assert read(tmp_path, model_type="qwen3").head_dim == 128
    assert read(tmp_path, model_type="qwen2").qkv_bias


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_field_is_read_as_transformers_reads_it_or_refused(tmp_path, family):
    """transformers writes out what it took an absent field for."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, num_hidden_layers=5).to_dict()
    config.pop("layer_types", None)
    for key in [key for key in config if key != "model_type"]:
        less = {k: v for k, v in config.items() if k != key}
        (tmp_path / "config.json").write_text(json.dumps(less))
        with suppress(CheckpointInvalid):
            spec = read_config(tmp_path)
            AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
            assert read_config(tmp_path) == spec, key


UNSUPPORTED = {
    "an unknown rope": ({"rope_scaling": {"type": "spiral", "factor": 4.0}}, "spiral"),
    "dynamic, old word": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "dynamic, new word": ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    "rope option": (
        {"rope_scaling": LLAMA3_SCALING | {"attention_factor": 1.5}},
        "attention_factor",
    ),
    "two thetas": ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "partial rotary in the table": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    "per-layer rope": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "full_attention",
    ),
    "activation": ({"hidden_act": "relu2"}, "hidden_act"),
    "sliding window": ({"use_sliding_window": True, "sliding_window": 128}, "use_sliding_window"),
    "layer types": ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "quantized": ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    "unknown field": ({"residual_multiplier": 0.22}, "residual_multiplier"),
}


@pytest.mark.parametrize(("changes", "word"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_what_changes_the_computation_is_refused_by_name(tmp_path, changes, word):
    with pytest.raises(Unsupported, match=word):
        read(tmp_path, **changes)


INVALID = {
    "missing": ({"rms_norm_eps": "absent"}, "rms_norm_eps"),
    "text": ({"hidden_size": "64"}, "hidden_size"),
    "zero": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "odd head": ({"head_dim": 15}, "head_dim"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "llama3 without a number": (
        {"rope_scaling": {k: v for k, v in LLAMA3_SCALING.items() if k != "factor"}},
        "factor",
    ),
    "llama3 bands": (
        {"rope_scaling": LLAMA3_SCALING | {"low_freq_factor": 4.0}},
        "low_freq_factor",
    ),
    "no model type": ({"model_type": "absent"}, "model_type"),
    "not finite": ({"rope_theta": float("inf")}, "rope_theta"),
    "past any float": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
}


@pytest.mark.parametrize(("changes", "word"), INVALID.values(), ids=INVALID.keys())
def test_impossible_values_are_named(tmp_path, changes, word):
    with pytest.raises(CheckpointInvalid, match=word):
        read(tmp_path, **changes)


@pytest.mark.parametrize(
    ("model_type", "near"),
    [
        ("qwen2_audio", "qwen2"),
        ("llama4", "mixtral"),
        ("gemma3n", "gemma3_text"),
        ("gemma4_unified_text", "gemma3_text"),
        ("deepseek_v32", "qwen2_moe"),
        ("mistrall", "mistral"),
        ("bloom", "llama"),
        ("mpt", "llama"),
        ("zebra", "llama"),
    ],
)
def test_an_unknown_family_names_the_nearest_supported_one(tmp_path, model_type, near):
    with pytest.raises(Unsupported, match=f"nearest is '{near}'") as caught:
        read(tmp_path, model_type=model_type)
    for family in (*FAMILIES, *WRAPPERS):
        assert family in str(caught.value)


def test_an_unknown_mixture_of_experts_is_near_to_one(tmp_path):
    with pytest.raises(Unsupported, match="nearest is 'mixtral'"):
        read(tmp_path, model_type="zebra", n_routed_experts=64)
    with pytest.raises(Unsupported, match="nearest is 'qwen3_moe'"):
        read(tmp_path, model_type="qwen3_5", num_experts=64)


def test_fields_that_change_nothing_are_accepted(tmp_path):
    harmless = {
        "use_cache": True,
        "transformers_version": "4.44.0",
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 21,
        "rope_scaling": None,
        "some_new_switch": False,
    }
    assert read(tmp_path, **harmless) == read(tmp_path)


def test_biases_and_norms_appear_in_the_expected_tensors(tmp_path):
    spec = read(tmp_path, model_type="qwen3", attention_bias=True, head_dim=32)
    shapes = naming(spec).tensors()
    assert shapes["model.layers.1.self_attn.o_proj.bias"] == (64,)
    assert shapes["model.layers.0.self_attn.q_norm.weight"] == (32,)
    assert "model.layers.0.mlp.up_proj.bias" not in shapes


ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": LLAMA3_SCALING,
    "yarn": YARN_SCALING,
    "yarn, tuned": YARN_SCALING | {"beta_fast": 8, "beta_slow": 2.0, "truncate": False},
    "yarn, two scales": YARN_SCALING | {"mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn, given": YARN_SCALING | {"attention_factor": 1.25},
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rope_tables_equal_those_of_transformers(tmp_path, rope):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    table = {**rope, "rope_theta": 5e5}
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=table
    )
    module = LlamaRotaryEmbedding(config)
    want_cos, want_sin = module(torch.zeros(1, 1), torch.arange(4096)[None])
    spec = read(
        tmp_path, hidden_size=512, max_position_embeddings=4096, rope_theta=5e5, rope_scaling=rope
    ).rope
    cos, sin = tables(spec, 128, 4096)
    assert np.abs(inverse_frequencies(spec, 128) - module.inv_freq.numpy()).max() < 1e-7
    assert np.abs(cos - want_cos[0, :, :64].numpy()).max() < 5e-4
    assert np.abs(sin - want_sin[0, :, :64].numpy()).max() < 5e-4


@pytest.mark.parametrize("length", [64, 65])
def test_longrope_has_a_table_for_either_side_of_the_original_context(tmp_path, length):
    import torch
    from transformers import Phi3Config
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    phi = {"model_type": "phi3", "original_max_position_embeddings": 64, "rope_theta": 1e4}
    rope = LONGROPE_SCALING | {"partial_rotary_factor": 0.75, "rope_theta": 1e4}
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters=rope,
    )
    want_cos, want_sin = Phi3RotaryEmbedding(config)(torch.zeros(1, 1), torch.arange(length)[None])
    spec = read(tmp_path, **phi, rope_scaling=LONGROPE_SCALING, partial_rotary_factor=0.75).rope
    cos, sin = tables(spec, 16, 128)
    begin = 0 if length <= 64 else 128
    assert cos.shape == (256, 6)
    assert np.abs(cos[begin : begin + length] - want_cos[0, :, :6].numpy()).max() < 1e-5
    assert np.abs(sin[begin : begin + length] - want_sin[0, :, :6].numpy()).max() < 1e-5
    assert tables(spec, 16, 64)[0].shape == (64, 6)  # what never leaves it needs one table


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_publishers_write_is_read(tmp_path, name):
    config = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = read_config(tmp_path)
    assert (spec.family, spec.layers) == (config["model_type"], config["num_hidden_layers"])


HOSTILE = [
    *("x", -1, 0, 1e308, 10**400, True, None),
    *([], {}, [[1]], ["a"] * 3, {"rope_type": ["yarn"]}),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_value_of_any_field_does_more_than_be_refused(tmp_path, name):
    for key in PUBLISHED[name]:
        for value in HOSTILE:
            (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name] | {key: value}))
            with suppress(CheckpointInvalid, Unsupported):
                read_config(tmp_path)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_no_value_of_a_wrapped_field_does_more_than_be_refused(tmp_path, wrapper):
    text = PUBLISHED["gemma-3-1b-it"] | {"model_type": WRAPPERS[wrapper].text_type}
    for key in (*text, "text_config", "vision_config", "tie_word_embeddings"):
        for value in HOSTILE:
            config = {"model_type": wrapper, "text_config": text | {key: value}, key: value}
            (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": wrapper}))
            with suppress(CheckpointInvalid, Unsupported):
                read_config(tmp_path)


def test_more_experts_than_a_checkpoint_could_name_are_refused(tmp_path):
    experts = {"model_type": "mixtral", "num_local_experts": 4096, "num_experts_per_tok": 2}
    with pytest.raises(CheckpointInvalid, match="experts"):
        read(tmp_path, num_hidden_layers=1000, **experts)


def published(tmp_path: Path, name: str):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    return read_config(tmp_path)


def test_published_configs_mean_what_their_authors_describe(tmp_path):
    assert published(tmp_path, "Mistral-7B-v0.1").kinds == (LayerKind(4096),) * 32
    assert published(tmp_path, "DeepSeek-R1-Distill-Qwen-7B").kinds == ()
    smollm3 = published(tmp_path, "SmolLM3-3B")
    assert [k.rope for k in smollm3.kinds[:5]] == ["main", "main", "main", "none", "main"]
    assert smollm3.tied_embeddings
    gemma3 = published(tmp_path, "gemma-3-1b-it")
    assert [k.window for k in gemma3.kinds[:7]] == [512] * 5 + [None, 512]
    assert gemma3.local_rope == RopeSpec(1e4) and gemma3.rope == RopeSpec(1e6)
    gemma2 = published(tmp_path, "gemma-2-2b")
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert gemma2.attention_scale == 256**-0.5 and gemma2.embedding_scale == 2304**0.5
    assert published(tmp_path, "gemma-2b").activation == "gelu_tanh"
    qwen3 = published(tmp_path, "Qwen3-30B-A3B")
    assert qwen3.experts == ExpertsSpec(128, 8, 768, True)
    phi4 = published(tmp_path, "Phi-4-mini-instruct").rope
    assert (phi4.dims, phi4.original_context, len(phi4.long_factors)) == (96, 4096, 48)
    granite = published(tmp_path, "granite-3.3-2b-instruct")
    assert (granite.logit_scale, granite.residual_scale) == (1 / 8, 0.22)
    stablelm = published(tmp_path, "stablelm-2-12b")
    assert (stablelm.block, stablelm.qk_norm, stablelm.rope.dims) == ("parallel", "heads", 40)
    glm = published(tmp_path, "GLM-4-9B-0414")
    assert (glm.block, glm.rope.dims, glm.rope.interleaved) == ("sandwich", 64, True)


FAMILY_REFUSALS = {
    "windows in a plain mistral": (
        {"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]},
        "ministral",
    ),
    "an unknown kind of layer": (
        {"model_type": "ministral", "layer_types": ["chunked_attention"] * 2},
        "chunked_attention",
    ),
    "both ways": ({"model_type": "gemma", "use_bidirectional_attention": True}, "bidirectional"),
    "an encoder's attention": ({"is_causal": False}, "is_causal"),
    "half a head in a llama": ({"partial_rotary_factor": 0.5}, "turns whole heads"),
    "a cap that gemma 3 leaves out": (
        {"model_type": "gemma3_text", "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping",
    ),
    "a yarn that transformers reads by halves": (
        {"model_type": "gemma3_text", "rope_scaling": YARN_SCALING | {"truncate": False}},
        "truncate",
    ),
    "a phi3 with another rope": (
        {"model_type": "phi3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "longrope",
    ),
    "a longrope beside another rope": (
        {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "rope_scaling": LONGROPE_SCALING
            | {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
        "two ropes",
    ),
    "an encoder too": ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    "a bias on the head": ({"model_type": "phi3", "lm_head_bias": True}, "lm_head_bias"),
    "a sliding llama": ({"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
    "two ropes at odds": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": YARN_SCALING},
        "rope_scaling",
    ),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "length a sequence"),
}


@pytest.mark.parametrize(("changes", "word"), FAMILY_REFUSALS.values(), ids=FAMILY_REFUSALS.keys())
def test_variants_that_are_not_carried_are_refused_by_name(tmp_path, changes, word):
    with pytest.raises(Unsupported, match=word):
        read(tmp_path, **changes)


FAMILY_MISTAKES = {
    "too few layer types": (
        {"model_type": "ministral", "layer_types": ["full_attention"]},
        "layer_types",
    ),
    "layers slide, but how far": (
        {
            "model_type": "ministral",
            "layer_types": ["sliding_attention"] * 2,
            "sliding_window": None,
        },
        "sliding_window",
    ),
    "a window of nothing, switched on": (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 0},
        "sliding_window",
    ),
    "a window of nothing": ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
    "more active experts than there are": (
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
        "num_experts_per_tok",
    ),
    "a billion experts": (
        {"model_type": "mixtral", "num_local_experts": 10**9, "num_experts_per_tok": 2},
        "num_local_experts",
    ),
    "factors of another head": (
        {
            "model_type": "phi3",
            "rope_scaling": LONGROPE_SCALING,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
        },
        "short_factor",
    ),
    "an odd part of a head": (
        {"model_type": "stablelm", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.45},
        "partial_rotary_factor",
    ),
    "a negative multiplier": ({"model_type": "granite", "logits_scaling": -8.0}, "logits_scaling"),
}


@pytest.mark.parametrize(("changes", "word"), FAMILY_MISTAKES.values(), ids=FAMILY_MISTAKES.keys())
def test_impossible_values_of_a_family_are_named(tmp_path, changes, word):
    with pytest.raises(CheckpointInvalid, match=word):
        read(tmp_path, **changes)


def test_layer_types_that_say_nothing_are_accepted_in_every_family(tmp_path):
    plain = read(tmp_path, model_type="granite")
    assert read(tmp_path, model_type="granite", layer_types=["full_attention"] * 2) == plain
    with pytest.raises(Unsupported, match="layer_types"):
        read(tmp_path, model_type="granite", layer_types=["sliding_attention"] * 2)


def test_two_numbers_of_experts_are_refused(tmp_path):
    experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "model_type": "qwen3_moe"}
    with pytest.raises(Unsupported, match="num_experts"):
        read(tmp_path, num_experts=4, num_local_experts=8, **experts)
    assert read(tmp_path, num_experts=4, num_local_experts=4, **experts).experts.count == 4


def test_a_mixture_in_which_no_layer_mixes_is_read_without_experts(tmp_path):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    spec = read(tmp_path, model_type="qwen3_moe", mlp_only_layers=[0, 1], **experts)
    assert (spec.experts, spec.kinds) == (None, ())


def test_the_pattern_of_windows_is_the_field_that_transformers_reads(tmp_path):
    """The one with the underscore is written by it beside `layer_types`, and never read."""
    gemma = {"model_type": "gemma3_text", "_sliding_window_pattern": 2, "sliding_window": 64}
    assert [k.window for k in read(tmp_path, **gemma).kinds] == [64, 64]
    pattern = read(tmp_path, **gemma, sliding_window_pattern=1)
    assert pattern.kinds == ()


def test_a_qwen2_moe_may_say_that_no_layer_slides(tmp_path):
    moe = {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2}
    moe |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    spec = read(tmp_path, **moe, use_sliding_window=True, sliding_window=9, max_window_layers=0)
    assert spec.kinds == (LayerKind(experts=True),) * 2


def test_null_is_not_the_default(tmp_path):
    assert read(tmp_path, model_type="mistral").kinds == (LayerKind(4096),) * 2
    assert read(tmp_path, model_type="mistral", sliding_window=None).kinds == ()
    assert (
        read(tmp_path, model_type="gemma2", attn_logit_softcapping=None).attention_softcap is None
    )


def test_old_words_of_ropes_and_windows_mean_the_new_ones(tmp_path):
    gemma = {"model_type": "gemma3_text", "rope_theta": "absent", "sliding_window": 64}
    old = read(
        tmp_path,
        **gemma | {"rope_theta": 1e6},
        rope_local_base_freq=1e4,
        rope_scaling={"type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )
    new = read(
        tmp_path,
        **gemma,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert old == new
    su = LONGROPE_SCALING | {"type": "su", "rope_type": None}
    phi = {"model_type": "phi3", "partial_rotary_factor": 0.75}
    phi |= {"original_max_position_embeddings": 64}
    del su["original_max_position_embeddings"]
    assert read(tmp_path, **phi, rope_scaling=su) == read(
        tmp_path, **phi, rope_scaling=LONGROPE_SCALING
    )
