"""The graph of every family, and of its variants, answers what transformers answers: over a prompt
longer than any sliding window and than the rope's original context, then token by token.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_build.families import FAMILIES as SUPPORTED
from remora_contract.bundle import GOLDEN_JSON
from tests.buildhost import family_forms
from tests.buildhost.reference import load_reference, reference_logits
from tests.support.checkpoints import make_checkpoint
from tests.support.dequantized import DequantizedBundle
from tests.support.portable import PortableModel

PROMPT, STEPS, CONTEXT = 80, 64, 160


def export(tmp_path: Path, form: str, **options) -> tuple[Path, Path]:
    """(checkpoint, bundle)"""
    family, settings = family_forms.FORMS[form]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, seed=1, **settings)
    defaults = {"dtype": "float32", "max_context": CONTEXT, "max_bank_rank": 8}
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(**defaults | options))
    return checkpoint, tmp_path / "bundle"


def greedy(model: PortableModel, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of greedy text: tokens [2, PROMPT + steps], logits [2, steps + 1, vocab]."""
    tokens = np.random.default_rng(2).integers(0, model.bundle.decoder.vocab, (2, PROMPT))
    logits = [model.step(tokens)]
    for _ in range(steps):
        tokens = np.concatenate([tokens, logits[-1].argmax(-1)[:, None]], axis=1)
        logits.append(model.step(tokens[:, -1:]))
    return tokens, np.stack(logits, axis=1)


def check_answers(checkpoint: Path, bundle: Path) -> None:
    """Logits, greedy tokens and golden prompts are those of transformers."""
    reference = load_reference(checkpoint)
    tokens, have = greedy(PortableModel(bundle, rows=2))
    want = reference_logits(reference, tokens)[:, PROMPT - 1 :]
    assert np.abs(have - want).max() <= 1e-4
    assert (have.argmax(-1) == want.argmax(-1)).all()
    for prompt in json.loads((bundle / GOLDEN_JSON).read_text())["prompts"]:
        said = reference_logits(reference, np.array([prompt["tokens"]]))[0]
        last = said[-len(prompt["expected"]) :]
        assert prompt["expected"] == last.argmax(-1).tolist()
        assert np.abs(np.array(prompt["logit"]) - last.max(-1)).max() <= 1e-4


@pytest.mark.parametrize("form", family_forms.FAMILIES)
def test_every_family_answers_what_transformers_answers(tmp_path, form):
    check_answers(*export(tmp_path, form))


@pytest.mark.parametrize("form", family_forms.VARIANTS)
def test_every_variant_answers_what_transformers_answers(tmp_path, form):
    check_answers(*export(tmp_path, form))


@pytest.mark.parametrize("form", family_forms.FAMILIES)
def test_every_family_in_int4_is_transformers_with_dequantized_weights(tmp_path, form):
    checkpoint, bundle = export(tmp_path, form, int4_block=32)
    model = PortableModel(bundle, rows=2)
    tokens, have = greedy(model, steps=8)
    reference = load_reference(checkpoint)
    DequantizedBundle(bundle, model.bundle.decoder).put_into(reference)
    want = reference_logits(reference, tokens)[:, PROMPT - 1 :]
    assert np.abs(have - want).max() <= 1e-4


@pytest.mark.parametrize("form", family_forms.FAMILIES)
def test_every_family_stays_close_in_float16(tmp_path, form):
    checkpoint, bundle = export(tmp_path, form, dtype="float16")
    tokens, have = greedy(PortableModel(bundle, rows=2), steps=8)
    want = reference_logits(load_reference(checkpoint), tokens)[:, PROMPT - 1 :]
    worst = np.abs(have - want).max(-1)  # of each position
    mixes = SUPPORTED[family_forms.FORMS[form][0]].words[0].router
    # A token whose experts are a close call may go to others in float16.
    assert (np.median(worst) if mixes else worst.max()) <= 4e-2


def test_every_supported_family_has_a_row_here():
    assert {family for family, _ in family_forms.FAMILIES.values()} == set(SUPPORTED)
