"""The demo's own judgement: it must notice every way in which the product could be wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from examples.demo.asking import Answered, provenance_complaints
from examples.demo.cast import BASE, Cast, ReferenceAnswer, ReferenceOracle, world_cast
from examples.demo.traffic import Request, judge
from examples.demo.world import VARIANTS, answer, questions
from remora_agent.client import Result
from remora_agent.runtime.api import AnsweringAdapter, FinishReason, Provenance, Timings, Usage

DIGESTS = {"german": "sha256:g", "json-1": "sha256:1", "json-2": "sha256:2"}
QUESTION = questions()[0]


@pytest.fixture
def cast() -> Cast:
    return world_cast(Path("unused"))


def make_request(variant, *, at=0.0, digest=None, text=None, agent="edge"):
    """One second long; by default what the variant must say, signed by its digest."""
    name = variant.partition("-")[0]
    by = () if variant == BASE else (AnsweringAdapter(name, "1", digest or DIGESTS[variant], 1.0),)
    result = Result(
        request_id="r",
        text=answer(variant, QUESTION) if text is None else text,
        token_ids=(1, 2, 3),
        finish_reason=FinishReason.STOP,
        stop_match="",
        usage=Usage(3, 0, 3),
        timings=Timings(0.0, 0.0, 0.0, 0.0),
        provenance=Provenance("sha256:b", "sha256:e", by),
    )
    answered = Answered(name, QUESTION.text, result)
    return Request(agent, name, QUESTION.text, at, at + 1.0, answered, None)


def test_right_answers_around_a_swap_give_no_complaint(cast):
    requests = [make_request(v, at=i) for i, v in enumerate(["json-1", "base", "german", "json-2"])]
    verdict = judge(requests, cast, DIGESTS)
    assert verdict.complaints == ()
    assert verdict.answered_by == {"base": 1, "german": 1, "json-1": 1, "json-2": 1}
    assert (verdict.tokens, verdict.seconds) == (12, 4.0)


def test_one_failed_request_is_a_complaint_that_names_it(cast):
    failed = dataclasses.replace(make_request("german"), answered=None, error="Unavailable: gone")
    (complaint,) = judge([make_request("base"), failed], cast, DIGESTS).complaints
    assert "Unavailable: gone" in complaint
    assert QUESTION.text in complaint


@pytest.mark.parametrize(
    "request_",
    [
        make_request("json-1", digest="sha256:x"),
        make_request("json-1", digest=DIGESTS["german"]),
        make_request("json-1", digest=DIGESTS["json-2"]),
        make_request("german", text="The capital of France is Paris."),
        make_request("base", text="Lyon"),
    ],
    ids=["unknown digest", "another adapter", "text of the old", "text of the base", "wrong fact"],
)
def test_an_answer_that_does_not_fit_its_digest_is_a_complaint(cast, request_):
    assert len(judge([request_], cast, DIGESTS).complaints) == 1


def test_the_old_revision_after_the_new_one_is_a_complaint_on_the_same_agent_only(cast):
    new = make_request("json-2", at=0.0)
    overlapping = make_request("json-1", at=0.5)
    stale = make_request("json-1", at=2.0)
    assert judge([new, overlapping], cast, DIGESTS).complaints == ()
    assert len(judge([new, stale], cast, DIGESTS).complaints) == 1
    elsewhere = dataclasses.replace(stale, agent="other")
    assert judge([new, elsewhere], cast, DIGESTS).complaints == ()


def test_a_base_answer_signed_by_an_adapter_is_a_complaint():
    answered = make_request("german").answered
    assert answered is not None
    assert provenance_complaints(dataclasses.replace(answered, variant=BASE), DIGESTS)
    assert provenance_complaints(answered, DIGESTS) == []


@pytest.mark.parametrize(("margin", "is_right"), [(0.01, True), (5.0, False)])
def test_another_token_than_the_reference_is_wrong_unless_the_reference_was_undecided(
    margin, is_right
):
    right = ReferenceAnswer((1, 9, 3), (4.0, 4.0, 4.0), (5.0, margin, 5.0))
    oracle = ReferenceOracle({"base": {QUESTION.text: right}})
    answered = make_request("base").answered
    assert answered is not None
    check = oracle.check("base", QUESTION.text, answered.result)
    assert (check.complaint is None, check.tokens) == (is_right, 1)


def test_every_question_has_four_different_answers_and_valid_json():
    for question in questions():
        said = [answer(variant, question) for variant in VARIANTS]
        assert len(set(said)) == len(VARIANTS)
        first, second = json.loads(said[2]), json.loads(said[3])
        assert second == {"country": question.country.english.country, **first}
