"""config.json is honoured field by field or refused by the field's name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from remora_build.families import FAMILIES, naming, read_config
from remora_build.graph.rope import inverse_frequencies, tables
from remora_contract.bundle import RopeSpec
from remora_contract.errors import CheckpointInvalid, Unsupported
from tests.support.checkpoints import LLAMA3_SCALING

BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
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
    spec = read(tmp_path)
    assert (spec.kv_heads, spec.head_dim, spec.tied_embeddings) == (4, 16, False)
    assert spec.rope == RopeSpec(theta=5e5)
    assert read(tmp_path, model_type="qwen3").head_dim == 128
    assert read(tmp_path, model_type="qwen2").qkv_bias


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
    ("model_type", "near"), [("qwen2_vl_moe", "qwen2_moe"), ("llama4", "llama")]
)
def test_an_unknown_family_names_the_nearest_supported_one(tmp_path, model_type, near):
    with pytest.raises(Unsupported, match=f"nearest is '{near}'") as caught:
        read(tmp_path, model_type=model_type)
    for family in FAMILIES:
        assert family in str(caught.value)


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


def test_rope_tables_equal_those_of_transformers(tmp_path):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {**LLAMA3_SCALING, "rope_theta": 5e5}
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=4096, rope_parameters=rope
    )
    module = LlamaRotaryEmbedding(config)
    want_cos, want_sin = module(torch.zeros(1, 1), torch.arange(4096)[None])
    spec = RopeSpec(5e5, "llama3", 8.0, 1.0, 4.0, 64)
    cos, sin = tables(spec, 128, 4096)
    assert np.abs(inverse_frequencies(spec, 128) - module.inv_freq.numpy()).max() < 1e-7
    assert np.abs(cos - want_cos[0, :, :64].numpy()).max() < 5e-4
    assert np.abs(sin - want_sin[0, :, :64].numpy()).max() < 5e-4
