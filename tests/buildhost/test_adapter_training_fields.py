"""LoraConfig's fields about training and provenance change no answer: peft's own forward pass is
that of the sidecar, whatever they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
from safetensors.numpy import load_file

from remora_build.adapters.convert import convert_adapter
from remora_contract.adapter import WEIGHTS_FILE
from remora_contract.targets import AdapterTarget
from tests.buildhost.documents import decoder_spec, write_bundle
from tests.support.adapters import make_peft_adapter, peft_quiet
from tests.support.checkpoints import make_checkpoint

SETTINGS: dict[str, dict[str, Any]] = {
    "lora_dropout": {"lora_dropout": 0.5},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "revision": {"revision": "a-branch"},
    "velora_config": {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
    "monteclora_config": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama", hidden=32, layers=1)


@pytest.mark.parametrize("field", SETTINGS)
def test_a_field_about_training_changes_no_answer(
    field: str, checkpoint: Path, tmp_path: Path
) -> None:
    decoder = decoder_spec(checkpoint)
    write_bundle(tmp_path / "base", decoder)
    peft_dir = make_peft_adapter(
        checkpoint, tmp_path / "peft", seed=1, r=4, target_modules=["q_proj"], **SETTINGS[field]
    )

    convert_adapter(peft_dir, tmp_path / "out", base=tmp_path / "base")

    tensors = load_file(tmp_path / "out" / WEIGHTS_FILE)
    target = AdapterTarget(0, "q")
    x = np.random.default_rng(2).standard_normal((5, 32)).astype(np.float32)
    got = x @ tensors[target.tensor_a()] @ tensors[target.tensor_b()]
    np.testing.assert_allclose(got, _added_by_peft(checkpoint, peft_dir, x), atol=1e-5)
    assert np.abs(got).max() > 0.1


def _added_by_peft(checkpoint: Path, peft_dir: Path, x: np.ndarray) -> np.ndarray:
    """What the adapter adds to the projection's answer, by peft's own forward pass: [5, n]."""
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with peft_quiet():
        model = peft.PeftModel.from_pretrained(base, peft_dir).eval()
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    given = torch.from_numpy(x)
    with torch.no_grad():
        return (module(given) - module.base_layer(given)).numpy()
