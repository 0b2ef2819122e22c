"""The exported graph on ONNX Runtime answers what transformers answers, family by family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from tests.buildhost.reference import load_reference, reference_logits
from tests.support.checkpoints import LLAMA3_SCALING, make_checkpoint, use_old_config
from tests.support.dequantized import DequantizedBundle
from tests.support.portable import PortableModel

PROMPT, STEPS, CONTEXT = 80, 32, 128  # past the original context of LLAMA3_SCALING

FORMS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-scaled": ("llama", {"rope_scaling": LLAMA3_SCALING}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-sharded-bf16": ("llama", {"shards": 3, "dtype": "bfloat16"}),
    "llama-head-dim": ("llama", {"head_dim": 24, "kv_heads": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-bf16": ("qwen2", {"tied": True, "dtype": "bfloat16"}),
    "qwen2-fp16-mha": ("qwen2", {"dtype": "float16", "kv_heads": 4}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-tied-fp16": ("qwen3", {"tied": True, "dtype": "float16"}),
    "qwen3-wide": ("qwen3", {"hidden": 128, "intermediate": 256, "head_dim": 32}),
    "qwen3-biased-sharded": ("qwen3", {"attention_bias": True, "shards": 2, "layers": 3}),
}


def export(tmp_path: Path, form: str, **options) -> tuple[Path, Path]:
    """(checkpoint, bundle)"""
    family, settings = FORMS[form]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, seed=1, **settings)
    chosen = ExportOptions(max_context=CONTEXT, golden=False, max_bank_rank=8, **options)
    export_checkpoint(checkpoint, tmp_path / "bundle", chosen)
    return checkpoint, tmp_path / "bundle"


def greedy(model: PortableModel, seed: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of greedy text: tokens [2, PROMPT + STEPS], logits [2, STEPS + 1, vocab]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.bundle.decoder.vocab, (2, PROMPT))
    logits = [model.step(tokens)]
    for _ in range(STEPS):
        tokens = np.concatenate([tokens, logits[-1].argmax(-1)[:, None]], axis=1)
        logits.append(model.step(tokens[:, -1:]))
    return tokens, np.stack(logits, axis=1)


def compared(checkpoint: Path, bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the graph and of transformers over the same greedy text."""
    tokens, have = greedy(PortableModel(bundle, rows=2))
    want = reference_logits(load_reference(checkpoint), tokens)[:, PROMPT - 1 :]
    return have, want


@pytest.mark.parametrize("form", FORMS)
def test_float32_graph_equals_transformers_over_prefill_and_decode(tmp_path, form):
    have, want = compared(*export(tmp_path, form, dtype="float32"))
    assert np.abs(have - want).max() <= 1e-4
    assert (have.argmax(-1) == want.argmax(-1)).all()


@pytest.mark.parametrize("form", ["llama-scaled", "qwen2-tied-bf16", "qwen3"])
def test_float16_graph_stays_close_to_transformers(tmp_path, form):
    have, want = compared(*export(tmp_path, form, dtype="float16"))
    assert np.abs(have - want).max() <= 2e-2


@pytest.mark.parametrize(
    ("form", "block"),
    [("llama-biased", 32), ("qwen2-tied-bf16", 32), ("qwen3", 32), ("qwen3-wide", 128)],
)
def test_int4_graph_equals_transformers_with_dequantized_weights(tmp_path, form, block):
    checkpoint, bundle = export(tmp_path, form, dtype="float32", int4_block=block)
    model = PortableModel(bundle, rows=2)
    tokens, have = greedy(model)
    reference = load_reference(checkpoint)
    DequantizedBundle(bundle, model.bundle.decoder).put_into(reference)
    want = reference_logits(reference, tokens)[:, PROMPT - 1 :]
    assert np.abs(have - want).max() <= 1e-4
    assert (have.argmax(-1) == want.argmax(-1)).all()


def test_old_and_new_config_words_mean_the_same_graph(tmp_path):
    new = make_checkpoint(tmp_path / "new", "llama", rope_scaling=LLAMA3_SCALING)
    old = make_checkpoint(tmp_path / "old", "llama", rope_scaling=LLAMA3_SCALING)
    use_old_config(old)
    options = ExportOptions(golden=False)
    bundles = [
        export_checkpoint(path, tmp_path / f"{path.name}-bundle", options, name="same")
        for path in (new, old)
    ]
    assert bundles[0] == bundles[1]
