"""x @ (a @ b) is what peft itself adds, for every kind of adapter and every target."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from remora_build.adapters.convert import convert_adapter
from remora_build.adapters.matching import module_path
from remora_contract.adapter import WEIGHTS_FILE, load_adapter
from remora_contract.bundle import verify_files
from tests.buildhost.documents import decoder_spec, write_bundle
from tests.support.adapters import make_peft_adapter, peft_quiet

LAYERS = 3
ONE_PER_KIND: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "v_proj"], "r": 4},
    "full_paths": {"target_modules": ["model.layers.1.mlp.up_proj", "layers.0.self_attn.o_proj"]},
    "regex": {"target_modules": r"model\.layers\.[02]\..*(q|k|down)_proj"},
    "all_linear": {"target_modules": "all-linear", "r": 3},
    "rslora": {"use_rslora": True, "r": 8, "lora_alpha": 16},
    "excluded": {"exclude_modules": ["mlp.up_proj", "k_proj"]},
    "excluded_regex": {"exclude_modules": r".*layers\.1\..*"},
    "rank_pattern": {"r": 4, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}},
    "alpha_pattern": {
        "alpha_pattern": {r"layers.[12].self_attn.(k|v)_proj": 3, "gate_proj": 40, "o_proj": 1}
    },
    "both_patterns_rslora": {
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 5, "q_proj": 6},
        "alpha_pattern": {"self_attn.*": 7},
    },
    "layers_list": {"layers_to_transform": [0, 2]},
    "layer_number": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "rank_is_dimension": {"target_modules": ["q_proj", "k_proj", "o_proj"], "r": 32},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.checkpoints import make_checkpoint

    return make_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), "qwen3", layers=LAYERS, hidden=32, head_dim=8
    )


@pytest.mark.parametrize("kind", ONE_PER_KIND)
def test_every_target_adds_what_peft_adds(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    decoder = decoder_spec(checkpoint)
    write_bundle(tmp_path / "base", decoder)
    peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=1, **ONE_PER_KIND[kind])

    adapter = convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "base")

    expected = _peft_deltas(checkpoint, peft_dir)
    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert {module_path(t.target) for t in adapter.targets} == set(expected)
    assert len(tensors) == 2 * len(expected)
    for target in (t.target for t in adapter.targets):
        k = decoder.in_features(target.projection)
        x = np.random.default_rng(2).standard_normal((5, k)).astype(np.float32)
        got = x @ (tensors[target.tensor_a()] @ tensors[target.tensor_b()])
        want = x @ expected[module_path(target)].T
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6 * max(1, np.abs(want).max()))


def test_the_written_document_loads_and_matches_its_file(checkpoint: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "base", decoder_spec(checkpoint))
    peft_dir = make_peft_adapter(checkpoint, tmp_path / "peft", seed=1, r=4, use_rslora=True)

    adapter = convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "base")

    assert load_adapter(tmp_path / "out") == adapter
    verify_files(tmp_path / "out", adapter.files)
    assert {(t.rank, t.scaling) for t in adapter.targets} == {(4, 16 / 4**0.5)}
    assert adapter.source_config["lora_alpha"] == 16


def test_a_pissa_adapter_saved_as_plain_lora_is_carried(checkpoint: Path, tmp_path: Path) -> None:
    """PEFT's own conversion doubles the rank and resets init_lora_weights."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    write_bundle(tmp_path / "base", decoder_spec(checkpoint))
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(
        r=2, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's advice on PiSSA, which this test follows
        model = peft.get_peft_model(base, config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
        model.peft_config["default"].init_lora_weights = "pissa"
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data += 0.1
        model.save_pretrained(
            tmp_path / "peft",
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
            save_embedding_layers=False,
        )

    adapter = convert_adapter(tmp_path / "peft", tmp_path / "out", base=tmp_path / "base")

    assert adapter.rank == 4
    assert adapter.projections() == ("q",)


def _peft_deltas(checkpoint: Path, peft_dir: Path) -> dict[str, np.ndarray]:
    """Module path -> what peft adds to the weight [n, k], from the adapter as peft loads it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with peft_quiet():
        model = peft.PeftModel.from_pretrained(base, peft_dir)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach().float().numpy()
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
