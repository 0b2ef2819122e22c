"""Guessing, its worth, and that no answer is another for it."""

import re
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_agent.runtime import speculation
from remora_agent.runtime.api import (
    Constraint,
    ConstraintKind,
    FinishReason,
    SamplingParams,
    Scoring,
)
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.runtime.speculation import (
    LENGTHS,
    Drafter,
    Speculation,
    StepCosts,
    best_length,
    lookup,
)
from remora_agent.runtime.step_forms import forms_agree
from tests.support.reference_engine import ReferenceEngine, fault
from tests.support.runtime import Listener, byte_tokenizer, request

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def text(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


# -- the guess --------------------------------------------------------------------------------


def test_what_followed_the_same_tokens_before_is_guessed():
    assert lookup(text(1, 2, 3, 4, 5, 9, 2, 3), 3).tokens == (4, 5, 9)


def test_the_longest_match_wins_over_a_later_shorter_one():
    found = lookup(text(7, 1, 2, 5, 0, 9, 1, 2, 6, 0, 7, 1, 2), 1)
    assert (found.tokens, found.match) == ((5,), 3)


def test_of_equal_matches_the_latest_wins():
    assert lookup(text(1, 2, 5, 1, 2, 6, 8, 1, 2), 1).tokens == (6,)


def test_a_repetition_is_guessed_to_go_on():
    assert lookup(text(9, 4, 5, 6, 4, 5, 6), 7).tokens == (4, 5, 6, 4, 5, 6, 4)
    assert lookup(text(9, 4, 4, 4), 3).tokens == (4, 4, 4)


@pytest.mark.parametrize("tokens", [(), (1,), (1, 1), (1, 2, 3, 4), (5, 1, 6, 1)])
def test_text_that_says_nothing_twice_gives_no_guess(tokens):
    assert lookup(text(*tokens), 4) is None


@given(TEXTS, st.integers(1, 10))
def test_a_guess_is_what_plain_search_finds(tokens, most):
    """The definition, spelt out."""
    n, found = len(tokens), lookup(text(*tokens), most)
    for match in range(6, 1, -1):
        for end in range(n - 1, match - 1, -1):  # the latest first
            if n > match and tokens[end - match : end] == tokens[n - match :]:
                longer = [*tokens]
                for _ in range(most):
                    longer.append(longer[end + len(longer) - n])
                assert (found.tokens, found.match) == (tuple(longer[n:]), match)
                return
    assert found is None


# -- whether it is worth a step ---------------------------------------------------------------


def affine(each: float):
    return lambda tokens: 1 + each * (tokens - 1)


def test_a_draft_is_as_long_as_it_pays():
    assert best_length(0.9, affine(0.02), 16) == 16
    assert best_length(0.9, affine(0.35), 16) == 4
    assert best_length(0.5, affine(0.35), 16) == 1
    assert best_length(0.3, affine(0.35), 16) == 0
    assert best_length(1.0, affine(1.0), 16) == 0


def test_a_draft_is_no_longer_than_asked():
    assert best_length(1.0, affine(0.01), 3) == 2
    assert best_length(1.0, affine(0.01), 0) == 0


@given(st.floats(0, 1), st.floats(0, 2), st.integers(0, 20))
def test_no_draft_is_chosen_that_is_expected_to_be_slower(rate, each, most):
    length = best_length(rate, affine(each), most)
    assert length == 0 or (length in LENGTHS and length <= most)
    assert sum(rate**i for i in range(length + 1)) / affine(each)(length + 1) >= 1


def test_costs_that_were_not_measured_lie_on_the_line_through_those_that_were():
    costs = StepCosts()
    assert not costs.known
    costs.record(1, 0.1)
    assert costs.known and costs.of(3) == pytest.approx(0.12)
    costs.record(5, 0.3)
    assert costs.of(3) == pytest.approx(0.2) and costs.of(9) == pytest.approx(0.5)
    costs.record(9, 0.3)
    assert costs.of(7) == pytest.approx(0.1 + 0.2 * 6 / 8)


def test_where_two_tokens_are_the_least_one_draft_costs_nothing_more():
    costs = StepCosts(least=2)
    costs.record(2, 0.1)
    assert costs.known and costs.of(1) == costs.of(2) == 0.1
    costs.record(5, 0.4)
    assert costs.of(3) == pytest.approx(0.2)
    assert best_length(0.1, costs.of, 8) == 1


def test_one_slow_step_does_not_decide_for_good():
    costs = StepCosts()
    costs.record(1, 0.1)
    costs.record(3, 0.12)
    costs.record(3, 60.0)
    assert costs.of(3) <= 0.15


def test_costs_that_forbid_drafts_are_tried_again_in_a_long_while():
    costs = StepCosts()
    costs.record(1, 0.1)
    costs.record(2, 0.3)
    tries = 0
    for _ in range(2000):
        if best_length(0.6, costs.of, 1):
            tries += 1
            costs.record(2, 0.3)
        else:
            costs.ease()
    assert 3 <= tries <= 10
    costs.record(1, 0.1)
    for _ in range(30):
        costs.record(2, 0.11)
    assert best_length(0.6, costs.of, 1) == 1


# -- a request's own drafts -------------------------------------------------------------------


def test_the_rate_of_a_request_whose_guesses_fail_falls_without_a_draft():
    drafter, answer = Drafter((1, 2, 3, 1, 2)), [9]
    first = None
    for _ in range(30):
        guess = drafter.guess(answer, 4)
        first = first or (guess and drafter.rate(guess))
        answer += [1, 2, len(answer) + 100]
        drafter.guess(answer[:-1], 4)
    guess = drafter.guess([*answer, 1, 2], 4)
    assert guess is not None and drafter.rate(guess) < 0.1


def test_the_rate_of_a_request_that_copies_rises():
    source = tuple(range(100, 160))
    drafter = Drafter(source)
    for end in range(2, 40):
        guess = drafter.guess(source[:end], 4)
    assert guess.tokens == source[39:43] and drafter.rate(guess) > 0.95


def test_a_drafter_follows_an_answer_of_any_length():
    drafter, answer = Drafter((1,)), []
    for i in range(500):
        answer.append(i % 7)
        guess = drafter.guess(answer, 3)
    assert guess.tokens == tuple((500 + i) % 7 for i in range(3))


class Asker:
    """Who speculation drafts for."""


def simulate(text_of_answer, prompt, cost, most=8):
    """Seconds with and without speculation of an answer that is what it is."""
    spec, asker, answer, spent = Speculation(most), Asker(), [text_of_answer[0]], 0.0
    while len(answer) < len(text_of_answer):
        room = len(text_of_answer) - len(answer) - 1
        draft = spec.draft(asker, prompt, answer, room)
        assert len(draft) <= room
        seconds = cost(len(draft) + 1)
        spent += seconds
        spec.computed(len(draft) + 1, seconds)
        for drafted in (*draft, None):
            answer.append(text_of_answer[len(answer)])
            if answer[-1] != drafted:
                break
    return spent, (len(text_of_answer) - 1) * cost(1)


@pytest.mark.parametrize("each", [0.05, 0.2, 0.35, 0.6])
def test_copying_is_faster_by_what_the_engine_allows(each):
    source = tuple(int(t) for t in np.random.default_rng(1).integers(0, 5000, 300))
    spent, plain = simulate(source, source, affine(each))
    best = max((k + 1) / affine(each)(k + 1) for k in (1, 2, 4, 8))
    assert plain / spent > 0.9 * best


@pytest.mark.parametrize("each", [0.05, 0.35, 1.0, 3.0])
@pytest.mark.parametrize("vocab", [2, 20, 200, 5000])
def test_random_text_is_hardly_slower_whatever_a_draft_costs(each, vocab):
    rng = np.random.default_rng(2)
    prompt = tuple(int(t) for t in rng.integers(0, vocab, 400))
    answer = tuple(int(t) for t in rng.integers(0, vocab, 400))
    spent, plain = simulate(answer, prompt, affine(each))
    assert spent < 1.04 * plain


def test_text_that_begins_to_copy_late_is_noticed():
    rng = np.random.default_rng(3)
    source = tuple(int(t) for t in rng.integers(0, 5000, 200))
    answer = tuple(int(t) for t in rng.integers(0, 40, 300)) + source
    spent, plain = simulate(answer, source, affine(0.1))
    assert plain - spent > 120


def test_speculation_of_no_tokens_drafts_none():
    spec = Speculation(0)
    spec.computed(1, 1.0)
    assert spec.draft(Asker(), (1, 2, 1, 2), (1, 2), 10) == ()


def test_nothing_is_kept_of_a_request_that_has_ended():
    spec, asker = Speculation(4), Asker()
    spec.draft(asker, (1, 2, 3), (1,), 5)
    del asker
    assert not len(spec._drafters)


# -- whole answers ----------------------------------------------------------------------------


@pytest.fixture(params=["repeating", "chaotic"])
def eager(request, serve, monkeypatch):
    """A runtime that proves a draft whenever there is a guess. Repeating: the next token depends on
    the last one alone, so that answers run in circles and guesses come true."""
    monkeypatch.setattr(
        speculation, "best_length", lambda rate, seconds, most: min(most, 8) if most > 0 else 0
    )

    def make(*args, **kwargs):
        s = serve(*args, **kwargs)
        if request.param == "repeating":
            s.engine._recur *= 0
        s.repeats = request.param == "repeating"
        return s

    return make


def test_a_greedy_answer_is_the_one_without_drafts(eager):
    s = eager(rows=2, context=200)
    r = request("a", tuple(range(30)) * 2, 100)
    heard = s.submit(r).wait()
    assert heard.tokens == s.solo(r)
    metrics = s.runtime.metrics()
    assert metrics["tokens"] == 100
    if s.repeats:
        assert metrics["accepted_tokens"] > 50 and len(s.engine.calls.scores) < 40
    assert metrics["accepted_tokens"] <= metrics["drafted_tokens"]


def test_a_seeded_answer_is_the_one_without_drafts(eager, serve):
    sampling = SamplingParams(0.8, top_k=5, top_p=0.9, seed=7)
    r = request("a", (1, 2, 3, 1, 2, 3, 1, 2), 60, sampling=sampling)
    s = eager(context=80)
    plain = serve(context=80, options=RuntimeOptions(draft_tokens=0))
    plain.engine._recur = s.engine._recur
    assert s.submit(r).wait().tokens == plain.submit(r).wait().tokens
    assert not plain.engine.calls.scores and plain.runtime.metrics()["drafted_tokens"] == 0


def test_an_adapters_answer_is_the_one_without_drafts(eager):
    s = eager({"a": 4, "b": 4}, context=120)
    for mix in ({"a": 1.0}, {"a": 0.5, "b": -2.0}):
        r = request(str(mix), tuple(range(20)) * 2, 60, mix)
        assert s.submit(r).wait().tokens == s.solo(r)
    assert all(i.leases == 0 for i in s.runtime.adapters.list())


def test_an_answer_ends_at_its_stop_wherever_in_a_draft_that_is(eager):
    s = eager(context=120)
    tokens = s.solo(request("a", (4, 5), 60))
    for i in range(1, 40, 3):
        stop = tokens[i]
        heard = s.submit(request(f"{i}", (4, 5), 60, stop_token_ids=(stop,))).wait()
        assert heard.tokens == tokens[: tokens.index(stop) + 1]
        assert heard.finished.reason is FinishReason.STOP


def test_a_stop_string_in_a_draft_ends_the_text_before_it(eager):
    s = eager(context=120)
    whole = byte_tokenizer().decode(list(s.solo(request("a", (4, 5), 60))))
    at = next(i for i in range(5, 50) if "�" not in whole[i : i + 2])
    stop = whole[at : at + 2]
    heard = s.submit(request("b", (4, 5), 60, stop=(stop,))).wait()
    assert heard.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("count", [1, 2, 3, 9, 10, 11, 20])
def test_an_answer_is_as_long_as_asked_also_at_the_end_of_the_context(eager, count):
    s = eager(context=20 + count)
    r = request("a", (1, 2) * 10, count)
    heard = s.submit(r).wait()
    assert heard.tokens == s.solo(r) and len(heard.tokens) == count
    assert heard.finished.reason is FinishReason.LENGTH


def test_rows_that_decode_together_prove_no_drafts(eager):
    s = eager(rows=3, context=120)
    gate = threading.Event()
    s.engine.before_step = lambda: gate.wait(20)
    asked = [request(f"{i}", (i, i + 1) * 5, 40) for i in range(3)]
    heard = [s.submit(r) for r in asked]
    gate.set()
    for r, listener in zip(asked, heard, strict=True):
        assert listener.wait().tokens == s.solo(r)
    assert len(s.engine.calls.scores) < 40


def test_a_request_may_end_in_the_middle_of_others_drafts(eager):
    """Alone, in company, alone again: drafts come and go."""
    s = eager({"a": 4}, rows=3, context=200)
    long = request("long", (1, 2) * 8, 150)
    first = s.submit(long)
    for i in range(4):
        r = request(f"short {i}", (i, 3, 4), 10, {"a": 1.0})
        assert s.submit(r).wait().tokens == s.solo(r)
    assert first.wait().tokens == s.solo(long)


def test_a_fault_while_proving_ends_the_request_alone(eager):
    s = eager(context=120)
    r = request("a", (1, 2) * 8, 100)
    seen = []

    def break_scores():
        if s.engine.calls.scores and not seen:
            seen.append(True)
            s.engine.faults.append(fault())

    s.engine.before_step = break_scores
    heard = s.submit(r).wait()
    if seen:
        assert "the backend failed" in str(heard.error)
    again = request("b", (1, 2) * 8, 20)
    assert s.submit(again).wait().tokens == s.solo(again)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_constrained_answer_with_logprobs_is_the_one_without_drafts(eager, serve, seed):
    """Drafts that the grammar forbids are not taken, and penalties count each token once."""
    one = Constraint(ConstraintKind.REGEX, "(ab|cd|a){40}")
    params = SamplingParams(0.0 if seed is None else 1.0, seed=seed, repetition_penalty=1.05)
    prompt = tuple(byte_tokenizer().encode("abcdabcdaabcdabcdaab" * 2).ids)
    made = request("a", prompt, 100, sampling=params, ignore_eos=False)
    made = replace(made, constraint=one, scoring=Scoring(top=2))
    drafting = eager(context=200)
    plain = serve(context=200, options=RuntimeOptions(draft_tokens=0))
    if drafting.repeats:
        plain.engine._recur *= 0
    heard = []
    for s in (drafting, plain):
        heard.append(Listener())
        s.runtime.submit(made, heard[-1], s.runtime.compile(one).result(20))
    first, second = (h.wait() for h in heard)
    assert first.tokens == second.tokens and re.fullmatch("(ab|cd|a){40}", first.text)
    scores = [[p for e in h.events[1:-1] for p in e.logprobs] for h in (first, second)]
    assert [p.token_id for p in scores[0]] == list(first.tokens)
    np.testing.assert_allclose(*[[p.logprob for p in s] for s in scores], atol=1e-4)
    assert drafting.runtime.metrics()["drafted_tokens"] > 0


# -- exact -------------------------------------------------------------------------------------

EXACT = RuntimeOptions(exact_drafts=True)


class Uneven(ReferenceEngine):
    """One token alone is read by another rounding than several, and its state keeps that; with
    `tail`, the third and later tokens of a step by a third one."""

    tail = False

    def decode(self, steps):
        super().decode(steps)
        for step in steps:
            self._states[step.row, step.position] += 0.02
        return np.stack([self._logits(step.row) for step in steps])

    def _chunk(self, row, tokens, start, mix, length):
        states = super()._chunk(row, tokens, start, mix, length)
        if self.tail:
            states[2:] += 0.02
        return states


@pytest.fixture
def uneven(eager, monkeypatch):
    monkeypatch.setattr("tests.agent.runtime.conftest.ReferenceEngine", Uneven)
    return eager


def answers(s, count=100):
    prompts = [(*range(i, i + 12), *range(i, i + 12)) for i in range(6)]
    asked = [request(f"{i}", prompt, count) for i, prompt in enumerate(prompts)]
    return [s.submit(r).wait().tokens for r in asked]


def test_exact_drafts_change_no_answer_where_one_token_alone_is_read_otherwise(uneven):
    drafting = uneven(context=200, options=EXACT)
    plain = uneven(context=200, options=replace(EXACT, draft_tokens=0))
    for s in (drafting, plain):
        s.runtime.probe()
    assert answers(drafting) == answers(plain)
    assert drafting.runtime.metrics()["drafted_tokens"] > 0
    assert plain.runtime.metrics()["drafted_tokens"] == 0
    assert not drafting.engine.calls.decodes and not plain.engine.calls.decodes


def test_without_exact_such_an_engine_answers_otherwise(uneven):
    """What the test before rests on."""
    drafting = uneven(context=200)
    plain = uneven(context=200, options=RuntimeOptions(draft_tokens=0))
    if not drafting.repeats:  # a circle hides it
        assert answers(drafting) != answers(plain)


def test_where_steps_of_several_tokens_differ_too_nothing_is_drafted(uneven, monkeypatch, caplog):
    monkeypatch.setattr(Uneven, "tail", True)
    s = uneven(context=200, options=EXACT)
    s.runtime.probe()
    assert "speculation.not_exact" in caplog.text
    scored = len(s.engine.calls.scores)
    answers(s, 20)
    assert len(s.engine.calls.scores) == scored and s.engine.calls.decodes


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_exact_steps_fit_also_at_the_end_of_the_context(eager, count):
    s = eager(context=20 + count, options=EXACT)
    r = request("a", (1, 2) * 10, count)
    assert s.submit(r).wait().tokens == s.solo(r)


def test_exact_answers_alone_and_in_company_are_what_they_are(eager):
    s = eager({"a": 4}, rows=3, context=200, options=EXACT)
    long = request("long", (1, 2) * 8, 150)
    first = s.submit(long)
    for i in range(4):
        r = request(f"short {i}", (i, 3, 4), 10, {"a": 1.0})
        assert s.submit(r).wait().tokens == s.solo(r)
    assert first.wait().tokens == s.solo(long)


@pytest.mark.parametrize("scored", [0, 1])
def test_exact_needs_nothing_of_an_engine_that_cannot_score_drafts(serve, scored):
    s = serve(context=80, scored=scored, options=EXACT)
    s.runtime.probe()
    r = request("a", (1, 2, 3, 1, 2, 3), 40)
    assert s.submit(r).wait().tokens == s.solo(r) and not s.engine.calls.scores


def test_the_forms_of_an_engine_are_compared_within_its_bounds():
    assert forms_agree(ReferenceEngine(context=5, scored=4), 16)
    assert forms_agree(ReferenceEngine(context=1, scored=16), 16)
    assert forms_agree(Uneven(), 16)
    uneven = Uneven()
    uneven.tail = True
    assert not forms_agree(uneven, 16)
