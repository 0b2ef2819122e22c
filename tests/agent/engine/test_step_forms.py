"""Which steps of ONNX Runtime's engine are equal bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from remora_agent.engine.cache import EngineCache
from remora_agent.engine.opening import EngineOptions, open_engine
from remora_agent.runtime import speculation
from remora_agent.runtime.api import SamplingParams, Scoring
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import MAX_DRAFT_TOKENS, RuntimeOptions
from remora_agent.runtime.step_forms import forms_agree
from remora_contract.bundle import load_bundle
from tests.agent.engine.portable import INT4, LLAMA, QWEN2, random_bundle
from tests.support.runtime import Listener, byte_text, request


@pytest.mark.parametrize("spec", [QWEN2, LLAMA], ids=["qwen2", "llama"])
@pytest.mark.parametrize("level", [1, 4])
def test_where_the_forms_agree_every_other_step_gives_the_same_bits(tmp_path, spec, level):
    random_bundle(tmp_path / "b", replace(spec, layers=4), INT4)
    options = EngineOptions(rows=1, threads=1, accuracy_level=level, prefill="plain")
    engine = open_engine(tmp_path / "b", EngineCache(tmp_path / "e", 1 << 40), options)
    if not forms_agree(engine, MAX_DRAFT_TOKENS):
        pytest.skip("this machine's kernels have more forms: exact drafts are off here")
    tokens = np.random.default_rng(3).integers(0, spec.vocab, 40)
    whole = engine.score(0, tokens, 0)
    for at in range(0, 40, 8):
        assert np.array_equal(engine.score(0, tokens[at : at + 8], at), whole[at : at + 8])
    engine.close()


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.5, top_k=2, seed=4)])
def test_exact_drafts_change_no_bit_of_a_rounded_engines_answers(tmp_path, monkeypatch, sampling):
    """Tokens and their logprobs, though level 4 rounds activations."""
    random_bundle(tmp_path / "b", replace(QWEN2, layers=4), INT4)
    bundle, options = load_bundle(tmp_path / "b"), EngineOptions(rows=1, threads=1, prefill="plain")
    monkeypatch.setattr(speculation, "best_length", lambda rate, seconds, most: max(0, most))
    heard, drafted = [], []
    for most in (8, 0):
        engine = open_engine(tmp_path / "b", EngineCache(tmp_path / "e", 1 << 40), options)
        exact = RuntimeOptions(draft_tokens=most, exact_drafts=True)
        runtime = ModelRuntime(engine, bundle, byte_text(), options=exact)
        runtime.probe()
        asked = request("a", (9, 8, 7) * 5, 30, sampling=sampling)
        heard.append(Listener())
        runtime.submit(replace(asked, scoring=Scoring(top=3)), heard[-1])
        heard[-1].wait(60)
        drafted.append(runtime.metrics()["drafted_tokens"])
        runtime.close()
    assert drafted[0] > drafted[1] == 0
    first, second = ([p for e in h.events[1:-1] for p in e.logprobs] for h in heard)
    assert len(first) == 30 and first == second
