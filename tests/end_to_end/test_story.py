"""Checkpoint to answers: what a user of the fleet sees."""

from __future__ import annotations

import pytest

from examples.demo.reference import MIX
from examples.demo.traffic import Traffic, judge

pytestmark = pytest.mark.slow


def test_a_fleet_answers_token_for_token_like_transformers_and_peft(stage):
    agents = stage.join("one", "two")
    stage.release("all", stage.artifacts.bundle.reference, "alpha", "beta-1")
    stage.roll_out("all", "--wave", "1")
    for agent in agents:
        found = stage.ask(agent, stage.artifacts.cast.variants(1))
        texts = {
            v: [a.result.text for a in found.answered if a.variant == v]
            for v in stage.artifacts.cast.variants(1)
        }
        assert texts["base"] != texts["alpha"] != texts["beta-1"] != texts["base"]


def test_a_use_case_answers_like_both_adapters_added_up(stage):
    (agent,) = stage.join("one")
    bundle = stage.artifacts.bundle.reference
    stage.release("all", bundle, "alpha", "beta-1", use_case="both=alpha:1,beta:1")
    stage.roll_out("all")
    cast, digests = stage.artifacts.cast, stage.artifacts.built.digests()
    with agent.client() as client:
        for question in cast.questions:
            result = client.generate(
                cast.prompt(question), use_case="both", max_tokens=cast.max_tokens, temperature=0.0
            )
            assert cast.oracle.check(MIX, question, result).complaint is None
            found = {a.digest for a in result.provenance.adapters}
            assert found == {digests["alpha"], digests["beta-1"]}


def test_a_new_revision_arrives_under_load_without_one_failed_or_doubtful_answer(stage):
    agents = stage.join("one", "two")
    stage.release("all", stage.artifacts.bundle.reference, "alpha", "beta-1")
    stage.roll_out("all")
    with Traffic(agents, stage.artifacts.cast) as traffic:
        shipped = stage.fleet.operator("adapters", "ship", "beta=beta@2", "--soak", "0.5")
        assert stage.ended(shipped["rollout_id"])["state"] == "COMPLETED"
    verdict = judge(traffic.requests, stage.artifacts.cast, stage.artifacts.built.digests())
    assert verdict.complaints == ()
    assert verdict.answered_by["beta-1"] > 0
    assert verdict.answered_by["base"] > 0
    for agent in agents:
        stage.ask(agent, stage.artifacts.cast.variants(2))
        builds = agent.events("engine.built")
        assert len(builds) == 1, "an adapter must not cost an engine build"
