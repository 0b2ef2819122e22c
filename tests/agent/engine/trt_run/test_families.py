"""An engine of every family, from either dialect, on the emulator: prompts, steps, scores and
states as transformers gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.probe import FLOAT32_TOLERANCE, load_golden, prove
from remora_agent.engine.protocol import MixEntry
from remora_contract.bundle import load_bundle
from remora_contract.digests import digest_bytes
from tests.agent.engine.test_family_engines import (
    LEGACY,
    PROMPT,
    STEPS,
    adapter_tensors,
    base_and_adapted,
    export,
)
from tests.buildhost import family_forms
from tests.buildhost.reference import load_reference, reference_logits, reference_states
from tests.support.adapters import bank_feed
from tests.support.portable import PortableModel
from tests.support.trt_engines import Bench, build


def check(tmp_path: Path, form: str, tolerance: float = 1e-4, **options) -> None:
    checkpoint, bundle = export(tmp_path, form, golden=False, **options)
    described = load_bundle(bundle)
    tensors = adapter_tensors(described)
    engine = Bench(bundle, build(bundle, tmp_path / "engine", rows=3, tokens=7)).open(rows=3)
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
    assert np.abs(have[0] - want).max() <= tolerance
    assert np.abs(have[1] - portable.forced(tokens[None], PROMPT)[0]).max() <= tolerance
    assert np.abs(scored - want[1:]).max() <= tolerance
    assert np.abs(embedded - states).max() <= tolerance * max(1.0, float(np.abs(states).max()))


@pytest.mark.parametrize("form", ["qwen3", "gemma2", "stablelm"])
def test_a_family_answers_what_transformers_answers(tmp_path: Path, form: str):
    check(tmp_path, form)


def test_either_graph_of_one_bundle_gives_an_engine_that_its_golden_prompts_prove(tmp_path: Path):
    _, bundle = export(tmp_path, "qwen3", dialect="both")
    golden, checked = load_golden(bundle), []
    for dialect in (None, "legacy"):
        entry = build(bundle, tmp_path / f"{dialect}", rows=2, dialect=dialect)
        engine = Bench(bundle, entry).open(rows=2)
        checked.append(prove(engine, golden, FLOAT32_TOLERANCE))
        engine.close()
    assert checked[0] == checked[1] > 20


@pytest.mark.slow
@pytest.mark.parametrize("form", [f for f in family_forms.FAMILIES if f != "qwen3"])
def test_every_family_answers_what_transformers_answers(tmp_path: Path, form: str):
    check(tmp_path, form)


@pytest.mark.parametrize("form", ["gemma2", "stablelm"])
def test_the_legacy_dialect_answers_it_too(tmp_path: Path, form: str):
    check(tmp_path, form, dialect="legacy")


@pytest.mark.slow
@pytest.mark.parametrize("form", LEGACY)
def test_the_legacy_dialect_of_every_spelling_answers_it(tmp_path: Path, form: str):
    check(tmp_path, form, dialect="legacy")


def test_a_float16_engine_stays_close(tmp_path: Path):
    check(tmp_path, "phi3", tolerance=2e-2, dtype="float16")
