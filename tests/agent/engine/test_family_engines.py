"""The built engine of every family, from either dialect, answers what transformers answers: past
the sliding window and the rope's original context, with base and adapted rows in one batch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.engine.probe import load_golden, prove, tolerance_of
from remora_agent.engine.protocol import Engine, Mix, MixEntry, RowStep
from remora_build.export.exporter import export_checkpoint
from remora_build.export.options import ExportOptions
from remora_contract.bundle import Bundle, bank_groups, load_bundle
from remora_contract.digests import digest_bytes
from remora_contract.targets import PARTS
from tests.buildhost import family_forms
from tests.buildhost.reference import load_reference, reference_logits, reference_states
from tests.support.adapters import Tensors, bank_feed, random_tensors
from tests.support.checkpoints import make_checkpoint
from tests.support.portable import PortableModel

PROMPT, STEPS, CONTEXT = 80, 12, 112
OPTIONS = EngineOptions(rows=3, threads=1, accuracy_level=1)
# Both dialects are tried with every operation that they spell differently.
LEGACY = ("llama", "gemma2", "gemma3_text", "phi3", "stablelm", "glm4", "olmo2", "ministral3")


def export(tmp_path: Path, form: str, **options) -> tuple[Path, Path]:
    family, settings = family_forms.FORMS[form]
    checkpoint = make_checkpoint(tmp_path / "checkpoint", family, seed=1, **settings)
    defaults = {"dtype": "float32", "max_context": CONTEXT, "max_bank_rank": 8}
    export_checkpoint(checkpoint, tmp_path / "bundle", ExportOptions(**defaults | options))
    return checkpoint, tmp_path / "bundle"


def opened(tmp_path: Path, bundle: Path) -> Engine:
    engine = open_engine(bundle, EngineCache(tmp_path / "engines", 1 << 40), OPTIONS)
    assert prove(engine, load_golden(bundle), tolerance_of(load_bundle(bundle), OPTIONS)) > 20
    return engine


def base_and_adapted(engine: Engine, tokens: np.ndarray, mix: Mix) -> np.ndarray:
    """Teacher-forced logits [2, STEPS + 1, vocab] of row 0 without and row 2 with `mix`."""
    rows = ((0, ()), (2, mix))
    logits = [[engine.prefill(row, tokens[:PROMPT], 0, m) for row, m in rows]]
    for at in range(PROMPT, PROMPT + STEPS):
        steps = [RowStep(row, int(tokens[at]), at, m) for row, m in rows]
        logits.append(list(engine.decode(steps)))
    return np.stack(logits, axis=1)


def adapter_tensors(bundle: Bundle) -> Tensors:
    """Random factors of every projection that the bank takes."""
    decoder, tensors = bundle.decoder, {}
    for layer in range(decoder.layers):
        groups = bank_groups(decoder, bundle.graph, layer)
        parts = [p for group in groups for p in PARTS[group]]
        tensors |= random_tensors(decoder, seed=4 + layer, projections=parts, layers=[layer])
    return tensors


def check(tmp_path: Path, form: str, tolerance: float = 1e-4, **options) -> None:
    checkpoint, bundle = export(tmp_path, form, **options)
    described = load_bundle(bundle)
    tensors = adapter_tensors(described)
    engine = opened(tmp_path, bundle)
    mix = (MixEntry(engine.add_adapter(AdapterWeights(digest_bytes(b"a"), tensors)), 0.7),)
    tokens = np.random.default_rng(2).integers(0, described.decoder.vocab, PROMPT + STEPS)
    have = base_and_adapted(engine, tokens, mix)
    embedded = engine.embed(1, tokens[:PROMPT], 0)
    scored = engine.score(1, tokens[PROMPT:], PROMPT)
    engine.close()
    reference = load_reference(checkpoint)
    want = reference_logits(reference, tokens[None])[0, PROMPT - 1 :]
    states = reference_states(reference, tokens[None, :PROMPT])[0]
    portable = PortableModel(bundle, rows=1)
    portable.adapter_feed = bank_feed(described, [tensors], [[0.7]])
    adapted = portable.forced(tokens[None], PROMPT)[0]
    assert np.abs(have[0] - want).max() <= tolerance
    assert np.abs(have[1] - adapted).max() <= tolerance
    assert np.abs(scored - want[1:]).max() <= tolerance
    assert np.abs(embedded - states).max() <= tolerance * max(1.0, float(np.abs(states).max()))
    assert np.abs(have[1] - have[0]).max() > 10 * tolerance


@pytest.mark.parametrize("form", family_forms.FAMILIES)
def test_the_engine_of_a_family_answers_what_transformers_answers(tmp_path, form):
    check(tmp_path, form)


@pytest.mark.slow
@pytest.mark.parametrize("form", family_forms.VARIANTS)
def test_the_engine_of_a_variant_answers_what_transformers_answers(tmp_path, form):
    check(tmp_path, form)


@pytest.mark.parametrize("form", LEGACY)
def test_an_engine_is_built_from_the_legacy_dialect_too(tmp_path, form):
    check(tmp_path, form, dialect="legacy")


@pytest.mark.parametrize("form", ["gemma2", "phi3"])
@pytest.mark.parametrize("dialect", ["native", "legacy"])
def test_an_engine_of_float16_stays_close(tmp_path, form, dialect):
    check(tmp_path, form, tolerance=2e-2, dtype="float16", dialect=dialect)
