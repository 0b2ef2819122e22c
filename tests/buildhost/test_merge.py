"""A merged checkpoint is, weight by weight in float32, what PEFT's merge_and_unload makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.buildhost.documents import plain_config, write_peft
from tests.buildhost.merging import (
    adapter,
    assert_same,
    checkpoint,
    load,
    logits,
    merge,
    merged_by_peft,
    quiet,
    state,
    with_adapter,
)

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.down_proj": 7},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regular expression": ("llama", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    "excluded": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "one layer": ("llama", {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "rank equal to a dimension": ("llama", {"r": 32, "target_modules": ["q_proj", "o_proj"]}),
    "all biases": ("qwen2", {"bias": "all"}),
    "biases of the adapted": ("qwen2", {"bias": "lora_only"}),
    "bias on B": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "both biases": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"}),
    "dora": ("llama", {"use_dora": True}),
    "dora with rslora": ("qwen2", {"use_dora": True, "use_rslora": True}),
    "dora of a fused projection": ("phi3", {"use_dora": True, "target_modules": "all-linear"}),
    "dora of embedding and head": (
        "llama",
        {"use_dora": True, "target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "dora of Conv1D": (
        "gpt2",
        {"use_dora": True, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "norms, head and embedding saved": (
        "llama",
        {"modules_to_save": ["lm_head", "norm", "embed_tokens"]},
    ),
    "a saved module with several parameters": ("qwen2", {"modules_to_save": ["self_attn"]}),
    "embedding and head adapted": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
    "trained tokens": ("llama", {"trainable_token_indices": [5, 1, 9]}),
    "trained tokens by module": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [4, 3]}},
    ),
    "fused projections": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "Conv1D and its biases": (
        "gpt2",
        {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "Conv1D although not said": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "a parameter that is a weight": (
        "llama",
        {"target_modules": ["v_proj"], "target_parameters": ["q_proj.weight"]},
    ),
    "eva": ("llama", {"init_lora_weights": "eva"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "velora, which acts in training": (
        "llama",
        {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
    ),
    "monteclora, which acts in training": (
        "llama",
        {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
    ),
}
for _family in ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"):
    for _what, _parameters in (("both", EXPERTS), ("up", EXPERTS[:1]), ("down", EXPERTS[1:])):
        CASES[f"experts of {_family}: {_what}"] = (
            _family,
            {"target_modules": ["q_proj"], "target_parameters": _parameters},
        )
CASES["experts at ranks of their own"] = (
    "mixtral",
    {
        "target_modules": ["q_proj"],
        "target_parameters": EXPERTS,
        "rank_pattern": {"experts.gate_up_proj": 3},
        "alpha_pattern": {"experts.down_proj": 5},
    },
)
for _family in ("mixtral", "qwen3_moe"):
    CASES[f"router and experts of {_family}"] = (_family, {"target_modules": "all-linear"})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            made[family] = checkpoint(tmp_path_factory.mktemp(family) / "base", family)
        return made[family]

    return base


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_are_those_of_peft(case: str, bases: Any, tmp_path: Path) -> None:
    family, config = CASES[case]
    base = bases(family)
    trained = adapter(base, tmp_path / "peft", **config)

    merged = merge(base, tmp_path / "out", trained)

    got = load(tmp_path / "out")
    assert_same(state(got), merged_by_peft(base, trained))
    torch.testing.assert_close(logits(got), logits(with_adapter(base, trained)), atol=1e-4, rtol=0)
    assert (logits(got) - logits(load(base))).abs().max() > 1e-2, "the adapter changes nothing"
    assert not merged.untied


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_adapter_stored_in_two_bytes_is_read_as_it_is(
    dtype: str, bases: Any, tmp_path: Path
) -> None:
    trained = adapter(bases("llama"), tmp_path / "peft", dtype=dtype)

    merge(bases("llama"), tmp_path / "out", trained)

    assert_same(state(load(tmp_path / "out")), merged_by_peft(bases("llama"), trained))


@pytest.fixture(scope="module")
def tall(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding that takes several panels, and several pieces when an adapter brings it."""
    return checkpoint(tmp_path_factory.mktemp("tall") / "base", vocab_size=20_000)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
        {"trainable_token_indices": [19_999, 0, 9_000]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_a_weight_of_several_panels_is_merged(config: Any, tall: Path, tmp_path: Path) -> None:
    trained = adapter(tall, tmp_path / "peft", **config)
    merge(tall, tmp_path / "out", trained)
    # PEFT sums the squares of 20,000 weights in float32.
    tolerance = 1e-5 if config.get("use_dora") else 1e-6
    assert_same(state(load(tmp_path / "out")), merged_by_peft(tall, trained), tolerance)


def test_a_base_weight_that_an_adapter_brings_is_the_base(tall: Path, tmp_path: Path) -> None:
    """PEFT loads what save_embedding_layers saved, should it differ from the checkpoint's."""
    trained = adapter(tall, tmp_path / "peft", target_modules=["embed_tokens"])
    weights = load_file(trained / "adapter_model.safetensors")
    weights["base_model.model.model.embed_tokens.base_layer.weight"][-1, -1] += 1
    save_file(weights, trained / "adapter_model.safetensors")

    merge(tall, tmp_path / "out", trained)

    assert_same(state(load(tmp_path / "out")), merged_by_peft(tall, trained))


def test_an_adapter_in_a_pickle_is_merged_without_running_it(bases: Any, tmp_path: Path) -> None:
    trained = adapter(bases("llama"), tmp_path / "peft", modules_to_save=["lm_head"])
    want = merged_by_peft(bases("llama"), trained)
    torch.save(load_file(trained / "adapter_model.safetensors"), trained / "adapter_model.bin")
    (trained / "adapter_model.safetensors").unlink()

    merge(bases("llama"), tmp_path / "out", trained)

    assert_same(state(load(tmp_path / "out")), want)


def test_an_adapter_of_single_experts_fits_their_tensors(bases: Any, tmp_path: Path) -> None:
    """As transformers 4 trained Mixtral: a module for each expert's projection."""
    base, random = bases("mixtral"), np.random.default_rng(0)
    tensors = {}
    for layer in range(2):
        for expert in range(3):
            for name, (outputs, inputs) in {"w1": (48, 32), "w3": (48, 32), "w2": (32, 48)}.items():
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}"
                for part, shape in {"A": (4, inputs), "B": (outputs, 4)}.items():
                    values = random.standard_normal(shape) * 0.2
                    tensors[f"{stem}.{name}.lora_{part}.weight"] = values.astype(np.float32)
    config = plain_config(r=4, lora_alpha=6, target_modules=["w1", "w2", "w3"])
    trained = write_peft(tmp_path / "peft", config, tensors)

    merge(base, tmp_path / "out", trained)

    assert_same(state(load(tmp_path / "out")), merged_by_peft(base, trained))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_peft_converted_is_plain_lora(
    init: str, bases: Any, tmp_path: Path
) -> None:
    """path_initial_model_for_weight_conversion: twice the rank, on the unchanged base."""
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=init
    )
    with quiet():
        model = peft.get_peft_model(load(bases("llama")), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p += 0.05
        expected = logits(model)
        model.save_pretrained(
            tmp_path / "peft", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )

    merge(bases("llama"), tmp_path / "out", tmp_path / "peft")

    torch.testing.assert_close(logits(load(tmp_path / "out")), expected, atol=1e-4, rtol=0)
