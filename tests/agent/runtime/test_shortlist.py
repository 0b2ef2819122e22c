"""A token drawn from a shortlist is the one that all logits give, or none is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from remora_agent.engine.protocol import Shortlist
from remora_agent.runtime import logprobs, shortlist
from remora_agent.runtime.api import Constraint, ConstraintKind, Delta, SamplingParams, Scoring
from remora_agent.runtime.distribution import weights_of
from remora_agent.runtime.drawing import HEAD
from remora_agent.runtime.model_runtime import ModelRuntime
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.sampling import Sampler
from remora_agent.runtime.shortlist import ShortRow
from remora_contract.errors import EngineFault
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import VOCAB, Listener, byte_text, make_bundle, request
from tests.support.shortlist_engine import ShortlistEngine, shortlisted

LOGPROB = 1e-4  # nats: between sums of float32 in different orders

biases = st.dictionaries(
    st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), max_size=20
).map(lambda b: tuple(b.items()))
parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-3, 0.1, 0.7, 1.0, 2.0, 1e30]),
    top_k=st.sampled_from([0, 0, 1, 5, 20, 40, 300]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.5, 0.9, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.1, 0.5, 3.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -2.0]),
    logit_bias=st.one_of(st.just(()), biases),
)


def logits_of(random: np.random.Generator, spread: float, coarse: bool) -> np.ndarray:
    """Coarse ones have many equals, as float16 has."""
    logits = (random.standard_normal(VOCAB) * spread).astype(np.float32)
    return np.round(logits) if coarse else logits


def row_of(logits: np.ndarray, sampler: Sampler, kept: int, room: int = VOCAB) -> ShortRow:
    watch = sampler.watch(room)
    found = shortlisted(logits[None], [watch], kept)
    return ShortRow(found, 0, watch, len(logits), lambda: logits)


@settings(max_examples=400, deadline=None)
@given(
    parameters,
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.5, 3.0, 10.0]),
    st.booleans(),
    st.sampled_from([1, 8, 32, VOCAB]),
    st.sampled_from([None, 1, 3, 100]),
    st.booleans(),
    st.sampled_from([4, 32, HEAD]),
    st.sampled_from([0, VOCAB]),
)
@example(SamplingParams(), 0, 0.0, True, 8, None, False, HEAD, 0)  # nothing but equals
def test_tokens_are_those_of_all_logits(params, seed, spread, coarse, kept, free, bans, head, room):
    """Without room only tokens that may be raised are watched."""
    random = np.random.default_rng(seed)
    prompt = random.integers(0, VOCAB, 12).tolist()
    full, short = Sampler(params, 0, prompt, head), Sampler(params, 0, prompt, head)
    for _ in range(4):
        logits = logits_of(random, spread, coarse)
        allowed = None
        if free is not None:
            allowed = np.zeros(VOCAB, np.bool_)
            allowed[random.choice(VOCAB, free, replace=False)] = True
        banned = random.choice(VOCAB, 3, replace=False) if bans and free != 1 else None
        if banned is not None and allowed is not None:
            allowed[(banned.max() + 1) % VOCAB] = True  # something is left
            banned = banned[banned != (banned.max() + 1) % VOCAB]
        row = row_of(logits, short, kept, room)
        expected = full.draw(logits, allowed, banned)
        token = short.pick(row, allowed, banned)
        if token is None:
            assert short.draw(row.all, allowed, banned) == expected
        else:
            assert token == expected


BIASED = tuple((i, 3.0) for i in range(0, VOCAB, 4))


@pytest.mark.parametrize(
    ("params", "free", "room"),
    [
        (SamplingParams(1.0, seed=1), None, VOCAB),
        (SamplingParams(1.0, seed=1), 120, VOCAB),
        (SamplingParams(1.0, seed=1, repetition_penalty=1.3), None, VOCAB),
        (SamplingParams(1.0, seed=1, repetition_penalty=1.3), None, 0),
        (SamplingParams(1.0, seed=1, presence_penalty=-0.5, repetition_penalty=1.1), None, 0),
        (SamplingParams(1.0, top_p=0.97, seed=1), None, VOCAB),
        (SamplingParams(1.0, top_k=60, seed=1), None, VOCAB),
        (SamplingParams(1.0, top_p=0.5, seed=1), 120, VOCAB),
        (SamplingParams(1.0, top_p=0.8, seed=1), None, VOCAB),
        (SamplingParams(1.0, top_p=0.5, seed=1, logit_bias=BIASED), None, VOCAB),
        (SamplingParams(1.5, top_p=0.6, seed=1, repetition_penalty=2.0), None, VOCAB),
        (SamplingParams(1.0, min_p=0.05, seed=1), None, VOCAB),
        (SamplingParams(1.0, min_p=1e-4, seed=1), None, VOCAB),
        (SamplingParams(1.0, top_p=0.9, min_p=0.02, seed=1), 200, VOCAB),
    ],
    ids=str,
)
def test_draws_at_the_shortlists_edge_are_those_of_all_logits(params, free, room):
    """Where what is not known matters as often as not."""
    random = np.random.default_rng(11)
    prompt = range(0, VOCAB, 3)
    full, short = (Sampler(params, 0, prompt, head=40) for _ in range(2))
    drawn = 0
    for i in range(1200):
        logits = logits_of(random, (1.0, 2.0, 3.0, 5.0, 8.0)[i % 5], False)
        allowed = None
        if free is not None:
            allowed = np.zeros(VOCAB, np.bool_)
            allowed[random.choice(VOCAB, free, replace=False)] = True
        expected = full.draw(logits, allowed)
        token = short.pick(row_of(logits, short, 24, room), allowed)
        drawn += token is not None
        assert (short.draw(logits, allowed) if token is None else token) == expected
    assert drawn > 100


@pytest.mark.parametrize("params", [{}, {"top_p": 0.99}, {"min_p": 1e-7}], ids=str)
def test_only_a_draw_of_a_token_that_is_not_known_reads_all_logits(params):
    """Each row as often as such tokens are drawn, and no oftener but for what rounding leaves
    open."""
    random, read, expected, rows = np.random.default_rng(3), 0, 0.0, 2000
    sampler = Sampler(SamplingParams(1.0, seed=1, **params), 0)
    for _ in range(rows):
        logits = -np.log(np.arange(1.0, 4001)).astype(np.float32) * np.float32(1.4)
        logits += random.standard_normal(4000).astype(np.float32) * np.float32(0.1)
        weights = np.sort(weights_of(logits, 1.0))[::-1]
        kept = np.cumsum(weights, dtype=np.float64)
        total = min(kept[-1], params.get("top_p", 1) * kept[-1])
        expected += 1 - kept[127] / total
        if sampler.pick(row_of(logits, sampler, 128)) is None:
            read += 1
            sampler.draw(logits)
    assert expected > 0.05 * rows
    assert abs(read - expected) < 3 * np.sqrt(expected) + 0.01 * expected


def test_allowed_tokens_that_are_all_known_need_no_others():
    random = np.random.default_rng(2)
    for params in (SamplingParams(1.0, seed=1), SamplingParams(1.0, top_k=20, seed=1)):
        sampler, full = Sampler(params, 0), Sampler(params, 0)
        for _ in range(50):
            logits = logits_of(random, 3.0, False)
            allowed = np.zeros(VOCAB, np.bool_)
            allowed[np.argsort(-logits)[[3, 9, 20]]] = True
            row = row_of(logits, sampler, 32)
            assert sampler.pick(row, allowed) == full.draw(logits, allowed)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.1, presence_penalty=0.5),
        SamplingParams(0.8, top_k=20),
        SamplingParams(1.0, top_p=0.9),
        SamplingParams(0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.1),
        SamplingParams(1.0, min_p=0.1),
        SamplingParams(0.01),
        SamplingParams(1.0),
        SamplingParams(1.0, top_p=0.99),
        SamplingParams(1.0, repetition_penalty=1.1),
    ],
    ids=str,
)
def test_usual_settings_are_drawn_from_the_shortlist(params):
    random = np.random.default_rng(4)
    sampler = Sampler(params, 0, (1, 2, 3))
    rows = (row_of(logits_of(random, 5.0, False), sampler, 64) for _ in range(100))
    assert sum(sampler.pick(row) is not None for row in rows) >= 95


def test_what_a_penalty_lowers_is_watched_only_where_it_matters_and_fits():
    seen, lowering = range(100), {"repetition_penalty": 1.1, "presence_penalty": 0.5}
    greedy = Sampler(SamplingParams(**lowering), 0, seen)
    narrow = Sampler(SamplingParams(1.0, top_k=20, **lowering), 0, seen)
    wide = Sampler(SamplingParams(1.0, **lowering), 0, seen)
    assert [len(s.watch(100).ids) for s in (greedy, narrow, wide)] == [0, 0, 100]
    assert len(wide.watch(99).ids) == 0


@pytest.mark.parametrize(
    "raising",
    [{"repetition_penalty": 0.9}, {"presence_penalty": -0.1}, {"frequency_penalty": -0.1}],
    ids=str,
)
def test_what_may_be_raised_is_always_watched(raising):
    sampler = Sampler(SamplingParams(logit_bias=((3, 0.5), (4, -0.5)), **raising), 0)
    logits = np.zeros(VOCAB, np.float32)
    logits[9] = 1
    assert sampler.draw(logits) == 9
    assert sampler.watch(0).ids.tolist() == [3, 9]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.5, top_k=4)], ids=str)
def test_logits_that_are_not_numbers_are_not_drawn_from(wrong, params):
    for place in (0, 100, VOCAB - 1):
        logits = logits_of(np.random.default_rng(0), 3.0, False)
        logits[place] = wrong
        sampler = Sampler(params, 0)
        row = row_of(logits, sampler, 8)
        assert sampler.pick(row) is None
        assert shortlist.scored(row, place, 1) is None
        with pytest.raises(EngineFault):
            sampler.draw(row.all)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 3.0, 10.0]),
    st.booleans(),
    st.integers(0, 20),
    st.sampled_from([8, 32, VOCAB]),
)
def test_logprobs_are_those_of_all_logits(seed, spread, coarse, top, kept):
    random = np.random.default_rng(seed)
    logits = logits_of(random, spread, coarse)
    sampler = Sampler(SamplingParams(logit_bias=((7, 50.0), (9, -50.0))), 0)
    row = row_of(logits, sampler, kept)
    for token in (7, 9, int(logits.argmax())):
        found = shortlist.scored(row, token, top)
        if kept == VOCAB:
            assert found is not None
        if found is not None:
            check_equal(found, logprobs.scored(logits, token, top))


def check_equal(found, expected):
    assert found.token_id == expected.token_id
    assert found.logprob == pytest.approx(expected.logprob, abs=LOGPROB)
    assert [t for t, _ in found.top] == [t for t, _ in expected.top]
    assert [p for _, p in found.top] == pytest.approx([p for _, p in expected.top], abs=LOGPROB)


def test_a_device_may_order_equals_as_it_likes():
    """Nothing says which of equal logits TopK takes, so none of the least is trusted."""
    logits = np.zeros(VOCAB, np.float32)
    logits[:3] = 1
    ids = np.array([[2, 0, 1, 200]], np.int32)  # of zeros, not the first
    tail = np.array([(VOCAB - 4) * np.exp(-1)], np.float32)
    found = Shortlist(ids, logits[ids], np.zeros((1, 0), np.float32), tail, tail)
    for params in (SamplingParams(), SamplingParams(1.0, top_k=3)):
        sampler = Sampler(params, 5)
        row = ShortRow(found, 0, sampler.watch(VOCAB), VOCAB, lambda: logits)
        assert sampler.pick(row) == Sampler(params, 5).draw(logits)
    row = ShortRow(found, 0, sampler.watch(VOCAB), VOCAB, lambda: logits)
    sampler = Sampler(SamplingParams(1.0, top_k=4), 5)
    assert sampler.pick(row) is None
    assert shortlist.scored(row, 0, 3) is not None and shortlist.scored(row, 0, 4) is None
    equals = Shortlist(ids[:, 3:], found.logits[:, 3:], found.watched, tail, tail)
    sampler = Sampler(SamplingParams(), 5)
    assert sampler.pick(ShortRow(equals, 0, sampler.watch(VOCAB), VOCAB, lambda: logits)) is None


# -- whole requests ---------------------------------------------------------------------------


def answers(engine, requests, constraints=(), options=None):
    """What each request hears, all of them at once."""
    from remora_agent.bank.directory import AdapterDirectory

    bundle = make_bundle(256)
    runtime = ModelRuntime(
        engine, bundle, byte_text(), AdapterDirectory(bundle), options or RuntimeOptions()
    )
    try:
        heard = []
        for made, constraint in zip(requests, constraints or [None] * len(requests), strict=True):
            listener = Listener()
            grammar = runtime.compile(constraint).result(20) if constraint else None
            runtime.submit(replace(made, constraint=constraint), listener, grammar)
            heard.append(listener)
        return [listener.wait() for listener in heard]
    finally:
        runtime.close()


def logprobs_of(heard):
    return [p for e in heard.events if isinstance(e, Delta) for p in e.logprobs]


def check_same(requests, constraints=(), kept=32, watched=64, options=None):
    """Through all logits and through shortlists; the engine, for what it counted."""
    engine = ShortlistEngine(4, 256, VOCAB, kept, watched)
    full = answers(ReferenceEngine(4, 256, VOCAB), requests, constraints, options)
    short = answers(engine, requests, constraints, options)
    for a, b in zip(full, short, strict=True):
        assert a.tokens == b.tokens and a.text == b.text
        assert type(a.events[-1]) is type(b.events[-1])
        ours, theirs = (
            [p for e in h.events if isinstance(e, Delta) for p in e.logprobs] for h in (a, b)
        )
        for found, expected in zip(ours, theirs, strict=True):
            check_equal(found, expected)
    return engine


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(parameters, st.sampled_from([None, 0, 3, 20]), st.integers(0, 6)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([8, 64]),
    st.sampled_from([0, 4, 64]),
)
def test_answers_are_those_of_all_logits(asked, kept, watched):
    requests = [
        replace(
            request(f"{i}", (i + 1, 5, 9), 12, sampling=params, ignore_eos=False, min_tokens=least),
            scoring=Scoring(top=top),
        )
        for i, (params, top, least) in enumerate(asked)
    ]
    check_same(requests, kept=kept, watched=watched)


def test_constrained_answers_are_those_of_all_logits():
    schema = Constraint(
        ConstraintKind.JSON_SCHEMA,
        '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}',
    )
    constraints = [schema, Constraint(ConstraintKind.REGEX, "[a-z]{20}"), None, schema]
    sampling = [SamplingParams(), SamplingParams(1.0, top_k=5, seed=3), SamplingParams(1.0, seed=1)]
    requests = [
        request(f"{i}", (1, 2 + i), 40, sampling=sampling[i % 3], ignore_eos=False)
        for i in range(4)
    ]
    check_same(requests, constraints, kept=128)


def test_a_repeated_text_with_drafts_is_that_of_all_logits():
    requests = [request("a", (1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2), 60)]
    check_same(requests, options=RuntimeOptions(draft_tokens=4))


def test_greedy_answers_read_nothing_back():
    engine = check_same([request(f"{i}", (i, 1), 30) for i in range(4)])
    assert engine.shortlisted == 4 * 29  # the first token is the prompt's
    assert engine.read_back == 0


def test_a_row_that_must_watch_more_than_the_engine_can_is_read_whole():
    raised = SamplingParams(logit_bias=tuple((i, 0.5) for i in range(20)))
    engine = check_same([request("a", max_tokens=10, sampling=raised)], watched=8)
    assert engine.read_back == engine.shortlisted == 9


def test_penalties_of_any_number_of_tokens_need_no_logits_but_the_shortlists():
    lowered = SamplingParams(
        0.3, top_k=5, repetition_penalty=1.2, logit_bias=tuple((i, -0.5) for i in range(100))
    )
    prompt = tuple(range(100, 200))
    engine = check_same([request("a", prompt, max_tokens=20, sampling=lowered)], watched=1)
    assert engine.shortlisted == 19 and engine.read_back == 0
