"""Graphs of quantized checkpoints, with and without adapters, answer as torch does with the weights
the checkpoint stands for: every layout, every target bound, the adapter branch on the activation as
it is before any smoothing or rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import GRAPH_FILE, load_bundle
from remora_contract.targets import PROJECTIONS, AdapterTarget, lora_a, lora_b, lora_gate
from tests.support.adapters import (
    Tensors,
    bank_feed,
    load_tensors,
    make_peft_adapter,
    peft_quiet,
    random_tensors,
)
from tests.support.checkpoints import make_checkpoint
from tests.support.dense import dense_copy
from tests.support.portable import PortableModel
from tests.support.quantized import LAYOUTS, Made, quantize_checkpoint
from tests.support.quantized_models import reference

PROMPT, STEPS, RANK = 12, 4, 8
TOLERANCE = 1e-4
# One rounding of an input that falls to the other side moves a few logits by about a step of it;
# a projection by itself is exact all the same.
ROUNDED_TOLERANCE = 1e-1


class Case:
    """One layout: the checkpoint, its bundle, and a bundle that ONNX Runtime runs."""

    def __init__(self, layout: str, source: Path, directory: Path) -> None:
        self.source = source
        self.made: Made = quantize_checkpoint(source, directory / "quantized", layout, seed=3)
        options = ExportOptions(
            dtype="float32", max_context=64, max_bank_rank=RANK, golden=False, own_adapters=True
        )
        self.bundle = directory / "bundle"
        self.document = export_checkpoint(self.made.directory, self.bundle, options)
        self.runnable = self.bundle
        if self.document.graph.quant.kind == "nvfp4":
            self.runnable = dense_copy(self.bundle, directory / "dense")
        rounded = self.document.graph.quant.activations != "none"
        self.tolerance = ROUNDED_TOLERANCE if rounded else TOLERANCE

    def answers(self, tokens: np.ndarray, *resident: Tensors) -> np.ndarray:
        """Logits [rows, STEPS + 1, vocab]: one prefill, then single steps."""
        model = PortableModel(self.runnable, rows=len(tokens))
        if resident:
            weights = [[1.0] * len(resident)] * len(tokens)
            model.adapter_feed = bank_feed(load_bundle(self.bundle), resident, weights)
        return model.forced(tokens, PROMPT)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    return make_checkpoint(directory, "qwen2", hidden=128, intermediate=256, seed=5)


@pytest.fixture(scope="module")
def peft_dir(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(source, tmp_path_factory.mktemp("peft") / "a", seed=1, r=4)


@pytest.fixture(scope="module", params=list(LAYOUTS))
def case(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    return Case(request.param, source, tmp_path_factory.mktemp("case"))


def tokens(rows: int = 2) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 320, (rows, PROMPT + STEPS))


def torch_logits(model: Any, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(rows)).logits[:, PROMPT - 1 :].numpy()


def test_the_graph_answers_as_torch_with_the_weights_the_checkpoint_stands_for(case: Case) -> None:
    have = case.answers(tokens())
    want = torch_logits(reference(case.source, case.made), tokens())
    assert np.abs(have - want).max() <= case.tolerance


def test_an_adapter_reads_the_activation_as_it_is_before_smoothing(
    case: Case, peft_dir: Path, tmp_path: Path
) -> None:
    import peft

    convert_adapter(peft_dir, tmp_path / "adapter", base=case.bundle)
    adapter = load_tensors(tmp_path / "adapter")
    assert len(adapter) == 7 * case.document.decoder.layers
    have = case.answers(tokens(), adapter)
    with peft_quiet():
        model = peft.PeftModel.from_pretrained(reference(case.source, case.made), peft_dir)
    want = torch_logits(model, tokens())
    assert np.abs(have - want).max() <= case.tolerance
    assert np.abs(have - case.answers(tokens())).max() > 10 * case.tolerance


def test_one_projection_with_its_adapter_is_exact_and_reads_the_plain_activation(
    case: Case,
) -> None:
    model = onnx.load(case.runnable / GRAPH_FILE)
    for name in ("layers.0.norm_attention", "layers.0.qkv.adapted"):
        dims = ["b", "s", None]
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, dims)
        model.graph.value_info.append(info)
    inputs = ["layers.0.norm_attention", lora_a(0, "qkv"), lora_b(0, "qkv"), lora_gate("qkv")]
    part = onnx.utils.Extractor(model).extract_model(inputs, ["layers.0.qkv.adapted"])
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        part.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 3, 128)).astype(np.float32)
    a, b = (rng.standard_normal(s).astype(np.float32) * 0.1 for s in ((128, 6), (6, 256)))
    gate = np.ones((1, 1, 6), np.float32)
    (have,) = session.run(None, dict(zip(inputs, (x, a, b, gate), strict=True)))
    modules = dict(reference(case.source, case.made).named_modules())
    with torch.no_grad():
        parts = [modules[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"]
        base = torch.cat([p(torch.from_numpy(x)) for p in parts], -1).numpy()
    assert np.abs(have - (base + x @ a @ b)).max() <= 2e-5


def test_every_target_of_every_layer_is_bound(case: Case) -> None:
    spec, rows = case.document.decoder, tokens(1)
    base = case.answers(rows)
    for layer in range(spec.layers):
        for projection in PROJECTIONS:
            one = random_tensors(spec, seed=1, projections=[projection], layers=[layer], scale=0.5)
            assert list(one) == [AdapterTarget(layer, projection)]
            moved = np.abs(case.answers(rows, one) - base).max()
            assert moved > 1e-3, f"an adapter on {layer}.{projection} changes nothing"


@pytest.mark.parametrize(
    "layout", ["modelopt-int8", "modelopt-smoothquant", "modelopt-fp8", "autoawq", "ct-int4"]
)
def test_the_legacy_dialect_answers_the_same(tmp_path: Path, source: Path, layout: str) -> None:
    made = quantize_checkpoint(source, tmp_path / "quantized", layout, seed=3)
    options = ExportOptions(
        "float32", max_context=64, golden=False, own_adapters=True, dialect="legacy"
    )
    bundle = export_checkpoint(made.directory, tmp_path / "bundle", options)
    have = PortableModel(tmp_path / "bundle", rows=2).forced(tokens(), PROMPT)
    want = torch_logits(reference(source, made), tokens())
    rounded = bundle.graph.quant.activations != "none"
    assert np.abs(have - want).max() <= (ROUNDED_TOLERANCE if rounded else TOLERANCE)
