"""A real DoRA adapter on its way to TensorRT-LLM and back: what PEFT computes, and nothing lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remora_build.adapters.convert import convert_adapter
from remora_build.adapters.formats.translate import Options, translate
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from remora_contract.errors import Unsupported
from tests.buildhost.adapter_formats import PROJECTION_OF_ID
from tests.support.adapters import make_peft_adapter, peft_quiet


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.support.checkpoints import make_checkpoint

    directory = tmp_path_factory.mktemp("checkpoint")
    return make_checkpoint(directory, "qwen3", hidden=32, head_dim=8)


@pytest.fixture(scope="module")
def base(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "base"
    options = ExportOptions(dtype="float32", max_context=64, dora=True)
    export_checkpoint(checkpoint, out, options)
    return out


@pytest.fixture(scope="module")
def peft_dir(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(
        checkpoint, tmp_path_factory.mktemp("peft") / "dora", seed=5, r=4, use_dora=True
    )


def test_a_dora_row_computes_what_pefts_layer_computes(
    checkpoint: Path, base: Path, peft_dir: Path, tmp_path: Path
) -> None:
    """y = m * (x W^T + (x in^T) out^T) for every projection; this model has no biases."""
    import peft
    import torch
    import transformers

    translate(
        peft_dir, tmp_path / "trtllm", base=base, options=Options(target="trtllm", dtype="float32")
    )
    weights = np.load(tmp_path / "trtllm" / "model.lora_weights.npy")[0]
    config = np.load(tmp_path / "trtllm" / "model.lora_config.npy")[0]
    assert config.shape == (14, 4) and config[:, 3].all()
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with peft_quiet():
        model = peft.PeftModel.from_pretrained(model, peft_dir)
    decoder = load_bundle(base).decoder
    for row, (id_, layer, rank, _) in zip(weights, config, strict=True):
        projection = PROJECTION_OF_ID[int(id_)]
        part = "mlp" if projection in ("gate", "up", "down") else "self_attn"
        module = model.get_submodule(
            f"base_model.model.model.layers.{layer}.{part}.{projection}_proj"
        )
        k, n = decoder.in_features(projection), decoder.out_features(projection)
        in_, out, m = np.split(row[: rank * (k + n) + n], [rank * k, rank * (k + n)])
        x = np.random.default_rng(0).standard_normal((3, k)).astype(np.float32)
        with torch.no_grad():
            need = module(torch.from_numpy(x)).numpy()
        weight = module.base_layer.weight.detach().numpy()
        have = m * (x @ weight.T + x @ in_.reshape(rank, k).T @ out.reshape(n, rank).T)
        assert np.allclose(have, need, atol=1e-4), (projection, layer)


@pytest.mark.parametrize("ranks", [1, 2])
def test_dora_comes_back_from_tensorrt_llm_as_the_same_sidecar(
    base: Path, peft_dir: Path, tmp_path: Path, ranks: int
) -> None:
    direct = convert_adapter(peft_dir, tmp_path / "direct", base=base)
    options = Options(target="trtllm", dtype="float32", tp_size=ranks)
    translate(tmp_path / "direct", tmp_path / "trtllm", base=base, options=options)
    translate(tmp_path / "trtllm", tmp_path / "back", base=base, options=Options())
    assert direct.dora
    for path in (tmp_path / "direct").iterdir():
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_edgellm_refuses_a_dora_adapter_by_name(base: Path, peft_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"layers\.0\.down: its DoRA magnitude"):
        translate(peft_dir, tmp_path / "out", base=base, options=Options(target="edgellm"))
    assert not (tmp_path / "out").exists()
