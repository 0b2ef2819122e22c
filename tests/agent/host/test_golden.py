"""Golden questions are asked of the real engine, in a child, before a release serves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from remora_agent.bank.weights import load_weights
from remora_agent.engine.cache import EngineCache
from remora_agent.engine.golden import compare_surprise
from remora_agent.engine.opening import EngineOptions, ensure_built, load_engine
from remora_agent.engine.protocol import MixEntry
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_contract.bundle import load_bundle
from remora_contract.errors import EngineFault, Unsupported
from remora_contract.gates import GoldenQuestion
from remora_contract.release import ReleaseUseCase, WeightedName

OPTIONS = EngineOptions(rows=1, threads=1)
PROMPT = (5, 9, 3, 17)


def quiet(phase: str, done: float) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def engines(real_bundles):
    settings = EngineSettings(cache_dir=real_bundles.cache, options=OPTIONS)
    return CachedEngines(settings)


@pytest.fixture(scope="module")
def truth(real_bundles):
    """Greedy answers and logits of the plain bundle: (base, with adapter a)."""
    bundle = load_bundle(real_bundles.plain)
    entry = ensure_built(real_bundles.plain, EngineCache(real_bundles.cache, 1 << 40), OPTIONS)
    engine = load_engine(entry.entry, bundle, OPTIONS)
    handle = engine.add_adapter(load_weights(real_bundles.adapter_dir("a"), bundle))
    found = []
    for mix in ((), (MixEntry(handle, 1.0),)):
        tokens, answer = list(PROMPT), []
        for _ in range(4):
            logits = engine.prefill(0, np.array(tokens, np.int64), 0, mix)
            answer.append((int(logits.argmax()), float(logits.max())))
            tokens.append(answer[-1][0])
        found.append(answer)
    engine.close()
    return found


def asked(real_bundles, *questions: GoldenQuestion, bundle=None):
    made = real_bundles.assignment("new", bundle or real_bundles.plain, "r1")
    both = ReleaseUseCase("both", (WeightedName("a", 1.0), WeightedName("b", 0.0)))
    return replace(made, golden=questions, use_cases=(both,))


def test_right_answers_let_it_pass(engines, real_bundles, truth):
    base, adapted = ([t for t, _ in answer] for answer in truth)
    assert base != adapted, "the test would say nothing"
    logits = tuple(logit for _, logit in truth[0][:2])
    questions = (
        GoldenQuestion("base", "exact", tokens=PROMPT, expected_tokens=tuple(base)),
        GoldenQuestion("a", "prefix", tokens=PROMPT, expected_tokens=tuple(adapted), use_case="a"),
        GoldenQuestion(
            "both", "prefix", tokens=PROMPT, expected_tokens=tuple(adapted), use_case="both"
        ),
        GoldenQuestion(
            "logits",
            "logits",
            tokens=(*PROMPT, base[0]),
            expected_tokens=tuple(base[:2]),
            logits=logits,
        ),
    )
    engines.ask(asked(real_bundles, *questions), None, quiet)


@pytest.mark.parametrize("kind", ["exact", "prefix"])
def test_a_wrong_answer_keeps_the_release_from_serving(engines, real_bundles, truth, kind):
    wrong = ((truth[0][0][0] + 1) % 64,)
    question = GoldenQuestion("capital", kind, tokens=PROMPT, expected_tokens=wrong)
    with pytest.raises(EngineFault, match="golden question capital: token 0"):
        engines.ask(asked(real_bundles, question), None, quiet)


def test_another_text_than_expected_is_shown(engines, real_bundles):
    question = GoldenQuestion("hello", "prefix", text="hello", expected_text="certainly not this")
    with pytest.raises(EngineFault, match="golden question hello: the answer is"):
        engines.ask(asked(real_bundles, question), None, quiet)


def test_moved_logits_are_told_with_both_numbers(engines, real_bundles, truth):
    token, logit = truth[0][0]
    question = GoldenQuestion(
        "l", "logits", tokens=PROMPT, expected_tokens=(token,), logits=(logit + 1.0,)
    )
    with pytest.raises(EngineFault, match="recorded"):
        engines.ask(asked(real_bundles, question), None, quiet)


def test_perplexity_is_compared_with_what_serves(engines, real_bundles):
    question = GoldenQuestion("ppl", "perplexity", text="a text to score", max_increase=0.0)
    new = asked(real_bundles, question)
    engines.ask(new, None, quiet)  # nothing serves: nothing to compare with
    engines.ask(new, asked(real_bundles), quiet)  # the same model: exactly as good
    lenient = replace(question, max_increase=10.0)
    engines.ask(asked(real_bundles, lenient, bundle=real_bundles.int4), new, quiet)


def test_a_perplexity_that_rose_is_refused():
    question = GoldenQuestion("ppl", "perplexity", text="x y", max_increase=0.05)
    compare_surprise(question, 1.04, 1.0)
    with pytest.raises(EngineFault, match=r"perplexity is 10\.5% above"):
        compare_surprise(question, 1.1, 1.0)
    with pytest.raises(EngineFault, match="not finite"):
        compare_surprise(question, float("nan"), 1.0)


def test_what_the_engine_cannot_hold_is_refused_by_name(engines, real_bundles):
    question = GoldenQuestion("long", "exact", tokens=(1,) * 400, expected_tokens=(1,))
    with pytest.raises(Unsupported, match="golden question long has 400 tokens"):
        engines.ask(asked(real_bundles, question), None, quiet)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "exact", "tokens": (1,)},
        {"kind": "exact", "text": "a", "tokens": (1,), "expected_text": "b"},
        {"kind": "exact", "text": "a", "expected_text": "b", "logits": (1.0,)},
        {"kind": "prefix", "tokens": (-1,), "expected_tokens": (1,)},
        {"kind": "logits", "tokens": (1,), "expected_tokens": (1,), "logits": ()},
        {"kind": "logits", "text": "a", "expected_tokens": (1,), "logits": (1.0,)},
        {"kind": "perplexity", "tokens": (1,)},
        {"kind": "perplexity", "text": "a", "expected_text": "b"},
        {"kind": "perplexity", "text": "a", "max_increase": -1.0},
        {"kind": "exact", "text": "", "expected_text": "b"},
    ],
)
def test_a_question_that_makes_no_sense_cannot_be_written_down(bad):
    with pytest.raises(ValueError, match="golden question q"):
        GoldenQuestion("q", **bad)
