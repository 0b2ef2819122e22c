"""The built engine runs every quantized graph, with adapters, as torch computes the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_agent.engine.probe import load_golden, prove, tolerance_of
from remora_agent.engine.protocol import MixEntry, RowStep
from remora_build.adapters.convert import convert_adapter
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import load_bundle
from tests.support.adapters import bank_feed, load_tensors, make_peft_adapter, peft_quiet
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel
from tests.support.quantized import quantize_checkpoint
from tests.support.quantized_models import fold, reference

PROMPT = [5, 9, 200, 31, 77, 12, 260, 8, 19, 44, 3]
NEXT = [17, 90, 41]
OPTIONS = EngineOptions(rows=2, threads=1, accuracy_level=1)
# Layout, and how its weights must be multiplied: MatMulNBits with so many bits, or float32.
LAYOUTS = {
    "modelopt-int4-awq": 4,
    "autoawq": 4,
    "gptq-asymmetric": 4,
    "ct-int4": 4,
    "modelopt-smoothquant": 8,
    "ct-int8": 8,
    "modelopt-fp8": None,
    "modelopt-mxfp8": None,
    "modelopt-nvfp4-awq": None,
}
ROUNDED = {"modelopt-smoothquant", "modelopt-fp8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source") / "checkpoint"
    return make_checkpoint(directory, "qwen2", hidden=128, intermediate=192, kv_heads=4, seed=5)


@pytest.fixture(scope="module")
def peft_dir(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft_adapter(source, tmp_path_factory.mktemp("peft") / "a", seed=1, r=4)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, "float32") for layout in LAYOUTS),
        *((layout, "float16") for layout in ("modelopt-nvfp4-awq", "autoawq")),
    ],
)
def test_a_quantized_graph_with_an_adapter_answers_as_torch(
    tmp_path: Path, source: Path, peft_dir: Path, layout: str, dtype: str
) -> None:
    import peft

    made = quantize_checkpoint(source, tmp_path / "quantized", layout, seed=3)
    bundle_dir = tmp_path / "bundle"
    options = ExportOptions(dtype=dtype, max_context=64, max_bank_rank=8, own_adapters=True)
    bundle = export_checkpoint(made.directory, bundle_dir, options)
    entry = ensure_built(bundle_dir, EngineCache(tmp_path / "engines", 1 << 40), OPTIONS).entry
    assert _bits(entry.directory) == LAYOUTS[layout]
    engine = load_engine(entry, load_bundle(bundle_dir), OPTIONS)
    assert prove(engine, load_golden(bundle_dir), tolerance_of(bundle, OPTIONS)) > 20
    convert_adapter(peft_dir, tmp_path / "adapter", base=bundle_dir)
    mix = (MixEntry(engine.add_adapter(load_weights(tmp_path / "adapter", bundle)), 1.0),)
    rows = [engine.prefill(0, np.array(PROMPT), 0, mix)]
    for i, token in enumerate(NEXT):
        rows.append(engine.decode([RowStep(0, token, len(PROMPT) + i, mix)])[0])
    engine.close()
    with peft_quiet(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(reference(source, made), peft_dir)
        want = model(torch.tensor([PROMPT + NEXT])).logits[0, len(PROMPT) - 1 :].numpy()
    exact = dtype == "float32" and layout not in ROUNDED
    assert np.abs(np.array(rows) - want).max() <= (1e-4 if exact else 5e-2)


def test_the_engine_undoes_scales_folded_into_norms_and_projections(
    tmp_path: Path, peft_dir: Path, source: Path
) -> None:
    """The built engine against the portable graph, whose numbers test_quant_original holds."""
    folded = fold(source, tmp_path / "folded", projections=True)
    made = quantize_checkpoint(folded, tmp_path / "quantized", "autoawq")
    options = ExportOptions("float32", max_context=64, max_bank_rank=8, original=source)
    bundle_dir = tmp_path / "bundle"
    bundle = export_checkpoint(made.directory, bundle_dir, options)
    assert b"branch_in" in (bundle_dir / "model.onnx").read_bytes()
    assert b"branch_out" in (bundle_dir / "model.onnx").read_bytes()
    convert_adapter(peft_dir, tmp_path / "adapter", base=bundle_dir)
    portable = PortableModel(bundle_dir)
    portable.adapter_feed = bank_feed(bundle, [load_tensors(tmp_path / "adapter")], [[1.0]])
    want = portable.step(np.array([PROMPT]))[0]
    entry = ensure_built(bundle_dir, EngineCache(tmp_path / "engines", 1 << 40), OPTIONS).entry
    engine = load_engine(entry, bundle, OPTIONS)
    mix = (MixEntry(engine.add_adapter(load_weights(tmp_path / "adapter", bundle)), 1.0),)
    have = engine.prefill(0, np.array(PROMPT), 0, mix)
    engine.close()
    assert np.abs(have - want).max() <= 1e-4


def _bits(engine: Path) -> int | None:
    """Of the projections' products in the built engine."""
    model = onnx.load(engine / "model.onnx", load_external_data=False)
    bits = {
        attribute.i
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    assert len(bits) <= 1
    return next(iter(bits), None)
