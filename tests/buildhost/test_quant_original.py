"""A smoothing scale that a tool folded into norms and projections is found by comparing with the
original checkpoint, so that the original's adapters read what they were trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.errors import RequestInvalid, Unsupported
from tests.support.adapters import bank_feed, load_tensors, make_peft_adapter, peft_quiet
from tests.support.checkpoints import edit_config, make_checkpoint
from tests.support.portable import PortableModel
from tests.support.quantized import Made, quantize_checkpoint
from tests.support.quantized_models import fold, reference

OPTIONS = ExportOptions(dtype="float32", max_context=64, max_bank_rank=8, golden=False)
TOKENS = np.random.default_rng(7).integers(0, 320, (2, 16))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    return make_checkpoint(directory, "qwen2", hidden=128, intermediate=256, kv_heads=4, seed=5)


@pytest.fixture(scope="module")
def peft_dir(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(source, tmp_path_factory.mktemp("peft") / "a", seed=1, r=4)


def adapted_delta(source: Path, peft_dir: Path, made: Made, folded: Path) -> np.ndarray:
    """What torch says: the quantized base, each LoRA branch on the original's activation.

    The original's modules run with weights that, times the folded scales, are the quantized ones.
    """
    import peft

    model = reference(source, made)
    original, changed = (load_file(d / "model.safetensors") for d in (source, folded))
    for name, module in model.named_modules():
        if name in made.modules:
            exact = changed[f"{name}.weight"].double()
            # Undo the folding in the weight, so that plain activations flow between modules.
            ratio = original[f"{name}.weight"].double() / exact
            module.truth.weight = (module.truth.weight.double() * ratio).float()
    with peft_quiet(), torch.no_grad():
        adapted = peft.PeftModel.from_pretrained(model, peft_dir)
        return adapted(torch.from_numpy(TOKENS)).logits[:, 9:].numpy()


def graph_logits(bundle_dir: Path, peft_dir: Path, tmp_path: Path) -> np.ndarray:
    convert_adapter(peft_dir, tmp_path / "adapter", base=bundle_dir)
    model = PortableModel(bundle_dir, rows=2)
    adapter = load_tensors(tmp_path / "adapter")
    model.adapter_feed = bank_feed(model.bundle, [adapter], [[1.0], [1.0]])
    return model.forced(TOKENS, 10)


@pytest.mark.parametrize(
    ("layout", "projections", "tolerance"),
    # Factors of norms are exact; those of projections are estimated from rounded weights.
    [
        ("ct-int8", False, 1e-4),
        ("ct-int4", False, 1e-4),
        ("ct-int8", True, 1e-2),
        ("autoawq", True, 1e-1),
    ],
)
def test_adapters_of_the_original_read_its_activations(
    tmp_path: Path, source: Path, peft_dir: Path, layout: str, projections: bool, tolerance: float
) -> None:
    folded = fold(source, tmp_path / "folded", projections=projections)
    made = quantize_checkpoint(folded, tmp_path / "quantized", layout)
    restored = ExportOptions(**vars(OPTIONS) | {"original": source})
    bundle = export_checkpoint(made.directory, tmp_path / "bundle", restored)
    plain = export_checkpoint(source, tmp_path / "plain", OPTIONS)
    assert bundle.base_digest == plain.base_digest
    have = graph_logits(tmp_path / "bundle", peft_dir, tmp_path)
    want = adapted_delta(source, peft_dir, made, folded)
    assert np.abs(have - want).max() <= tolerance
    # Without the comparison the branch reads the smoothed activation: another answer.
    own = ExportOptions(**vars(OPTIONS) | {"own_adapters": True})
    export_checkpoint(made.directory, tmp_path / "own", own)
    wrong = graph_logits(tmp_path / "own", peft_dir, tmp_path / "wrong")
    assert np.abs(wrong - want).max() > 1


def test_a_checkpoint_without_smoothing_gets_no_correction(tmp_path: Path, source: Path) -> None:
    made = quantize_checkpoint(source, tmp_path / "quantized", "gptq")
    options = ExportOptions(**vars(OPTIONS) | {"original": source})
    export_checkpoint(made.directory, tmp_path / "bundle", options)
    names = [n.name for n in PortableModel(tmp_path / "bundle").inputs]
    text = (tmp_path / "bundle" / "model.onnx").read_bytes()
    assert names and b"branch_in" not in text and b"branch_out" not in text


def test_a_tool_that_folds_is_refused_until_somebody_says_whose_adapters_come(
    tmp_path: Path, source: Path
) -> None:
    made = quantize_checkpoint(source, tmp_path / "quantized", "autoawq")
    with pytest.raises(Unsupported, match=r"--original .* --own-adapters .* --max-bank-rank 0"):
        export_checkpoint(made.directory, tmp_path / "bundle", OPTIONS)
    bankless = ExportOptions(**vars(OPTIONS) | {"max_bank_rank": 0})
    export_checkpoint(made.directory, tmp_path / "bundle", bankless)


@pytest.mark.parametrize("change", ["weights", "embedding", "norm", "config"])
def test_another_models_checkpoint_is_not_the_original(
    tmp_path: Path, source: Path, change: str
) -> None:
    made = quantize_checkpoint(source, tmp_path / "quantized", "ct-int8")
    other = shutil.copytree(source, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    names = {
        "weights": "model.layers.1.mlp.down_proj.weight",
        "embedding": "model.embed_tokens.weight",
        "norm": "model.norm.weight",
    }
    if change == "config":
        edit_config(other, rms_norm_eps=1e-3)
    else:
        tensors[names[change]] = tensors[names[change]].flip(0).contiguous()
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    options = ExportOptions(**vars(OPTIONS) | {"original": other})
    with pytest.raises(Unsupported, match="--original"):
        export_checkpoint(made.directory, tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


def test_an_original_goes_with_a_quantized_checkpoint_only(tmp_path: Path, source: Path) -> None:
    options = ExportOptions(**vars(OPTIONS) | {"original": source})
    with pytest.raises(RequestInvalid, match="--original"):
        export_checkpoint(source, tmp_path / "bundle", options)
    assert json.loads((source / "config.json").read_text())["model_type"] == "qwen2"
