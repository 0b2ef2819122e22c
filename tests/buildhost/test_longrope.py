"""Rows on either side of a longrope's original context, as docs/graph.md says: the call in which a
row's last position lies past it uses the long table, and keys stay as they were written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from tests.buildhost.reference import load_reference, reference_logits
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel

ORIGINAL = 64  # of the preset


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    root = tmp_path_factory.mktemp("longrope")
    checkpoint = make_checkpoint(root / "checkpoint", "phi3", seed=1)
    options = ExportOptions(dtype="float32", max_context=160, max_bank_rank=0, golden=False)
    export_checkpoint(checkpoint, root / "bundle", options)
    return load_reference(checkpoint), root / "bundle"


def tokens_of(count: int) -> np.ndarray:
    return np.random.default_rng(6).integers(0, 320, (1, count))


def test_a_sequence_within_the_original_context_turns_by_the_short_factors(made):
    reference, bundle = made
    tokens = tokens_of(ORIGINAL)
    have = PortableModel(bundle).forced(tokens, prompt=40)
    assert np.abs(have - reference_logits(reference, tokens)[:, 39:]).max() <= 1e-4


def test_a_prompt_beyond_it_turns_by_the_long_factors_from_its_first_token(made):
    reference, bundle = made
    tokens = tokens_of(ORIGINAL + 30)
    have = PortableModel(bundle).forced(tokens, prompt=ORIGINAL + 1)
    assert np.abs(have - reference_logits(reference, tokens)[:, ORIGINAL:]).max() <= 1e-4


def test_a_sequence_that_grows_past_it_goes_on_as_transformers_does_with_its_cache(made):
    reference, bundle = made
    tokens, prompt = tokens_of(ORIGINAL + 6), ORIGINAL - 4
    have = PortableModel(bundle).forced(tokens, prompt=prompt)
    cache, want = DynamicCache(config=reference.config), []
    steps = [tokens[:, :prompt], *(tokens[:, i : i + 1] for i in range(prompt, tokens.shape[1]))]
    with torch.no_grad():
        for step in steps:
            out = reference(torch.from_numpy(step), cache=cache, use_cache=True)
            want.append(out.logits[:, -1].numpy())
    assert np.abs(have - np.stack(want, axis=1)).max() <= 1e-4


def test_rows_of_one_call_choose_their_factors_apart(made):
    """Row 0 stands just before the end of the original context, row 1 behind it."""
    reference, bundle = made
    tokens = np.repeat(tokens_of(ORIGINAL + 8), 2, axis=0)
    model = PortableModel(bundle, rows=2)
    lengths = (ORIGINAL - 2, ORIGINAL + 5)
    caches = []
    for length in lengths:
        alone = PortableModel(bundle, rows=1)
        alone.step(tokens[:1, :length])
        caches.append(alone.cache)
    model.cache = {n: np.concatenate([c[n] for c in caches]) for n in caches[0]}
    have = model.step_at(np.array([[tokens[0, n]] for n in lengths]), np.array(lengths)[:, None])
    for row, length in enumerate(lengths):
        want = reference_logits(reference, tokens[:1, : length + 1])[0, -1]
        assert np.abs(have[row] - want).max() <= 1e-4
