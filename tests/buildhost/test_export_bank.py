"""The adapter branch of the exported graph: y = x W + ((x A) * gate) B, row by row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract import targets
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import GROUPS, PARTS
from tests.buildhost.reference import load_reference, reference_logits
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel

ROWS, TOKENS, SPLIT = 3, 24, 16
COLUMNS = {"qkv": 12, "o": 4, "gate_up": 8, "down": 0}  # each group has its own T, 0 is legal


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    checkpoint = make_checkpoint(root / "checkpoint", "qwen2", seed=3)
    options = ExportOptions(dtype="float32", max_context=32, max_bank_rank=16, golden=False)
    export_checkpoint(checkpoint, root / "bundle", options)
    return checkpoint, root / "bundle"


def random_bank(spec: DecoderSpec, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    feed: dict[str, np.ndarray] = {}
    for group in GROUPS:
        t, k = COLUMNS[group], spec.in_features(PARTS[group][0])
        n = sum(spec.out_features(p) for p in PARTS[group])
        gate = rng.uniform(-1, 2, (ROWS, 1, t))
        gate[0] = 0  # the first row uses no adapter
        feed[targets.lora_gate(group)] = gate.astype(np.float32)
        for layer in range(spec.layers):
            a, b = rng.normal(0, 0.1, (k, t)), rng.normal(0, 0.3, (t, n))
            feed[targets.lora_a(layer, group)] = a.astype(np.float32)
            feed[targets.lora_b(layer, group)] = b.astype(np.float32)
    return feed


def merged_logits(checkpoint, spec: DecoderSpec, feed, row: int, tokens) -> np.ndarray:
    """transformers with W + A diag(gate) B of one row in its weights."""
    model = load_reference(checkpoint)
    modules = dict(model.named_modules())
    for layer in range(spec.layers):
        for group in GROUPS:
            gate = feed[targets.lora_gate(group)][row, 0]
            a, b = feed[targets.lora_a(layer, group)], feed[targets.lora_b(layer, group)]
            delta, begin = (a * gate) @ b, 0
            for part in PARTS[group]:
                end = begin + spec.out_features(part)
                block = "mlp" if part in ("gate", "up", "down") else "self_attn"
                weight = modules[f"model.layers.{layer}.{block}.{part}_proj"].weight
                with torch.no_grad():
                    weight += torch.from_numpy(delta[:, begin:end].T.copy())
                begin = end
    return reference_logits(model, tokens)


def test_every_row_answers_as_its_own_merged_model(exported):
    checkpoint, bundle = exported
    model = PortableModel(bundle, rows=ROWS)
    spec = model.bundle.decoder
    model.adapter_feed = random_bank(spec, seed=4)
    tokens = np.random.default_rng(5).integers(0, spec.vocab, (ROWS, TOKENS))
    have = model.forced(tokens, SPLIT)
    for row in range(ROWS):
        want = merged_logits(checkpoint, spec, model.adapter_feed, row, tokens[row : row + 1])
        assert np.abs(have[row] - want[0, SPLIT - 1 :]).max() <= 1e-4


def test_a_row_without_adapter_answers_as_the_base_whatever_is_resident(exported):
    _, bundle = exported
    adapted, base = PortableModel(bundle, rows=ROWS), PortableModel(bundle, rows=ROWS)
    adapted.adapter_feed = random_bank(adapted.bundle.decoder, seed=6)
    tokens = np.random.default_rng(7).integers(0, 320, (ROWS, TOKENS))
    have, want = adapted.forced(tokens, SPLIT), base.forced(tokens, SPLIT)
    assert np.abs(have[0] - want[0]).max() <= 1e-5
    assert np.abs(have[1] - want[1]).max() > 1e-2


def test_a_bundle_without_a_bank_has_no_adapter_inputs(exported, tmp_path):
    checkpoint, with_bank = exported
    options = ExportOptions(dtype="float32", max_context=32, max_bank_rank=0, golden=False)
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle", options)
    model = PortableModel(tmp_path / "bundle")
    assert not [i.name for i in model.inputs if i.name.startswith("lora")]
    assert bundle.base_digest == PortableModel(with_bank).bundle.base_digest
