"""A candidate that answers nobody, judged by what it says to people's questions: real agents, the
controller and the operator's commands."""

from __future__ import annotations

import pytest

from examples.demo.processes import await_value

pytestmark = pytest.mark.slow


def test_a_shadow_is_compared_on_the_device_and_its_counts_reach_the_operator(stage):
    """The candidate `same` is the incumbent's bytes, so it agrees in everything."""
    (agent,) = stage.join("one")
    arms = {
        "control": {"adapter": "beta", "percent": 100},
        "candidate": {"adapter": "same", "percent": 0},
    }
    shadow = {"incumbent": "control", "candidate": "candidate", "percent": 100}
    rules = {"agrees": "shadow.exact / shadow.compared > 0.99"}
    experiment = {"arms": arms, "shadow": shadow, "promote": rules, "min_requests": 3}
    adapters = {"beta": "beta@1", "same": "beta@1"}
    stage.release_file("shadowed", adapters, experiments={"beta": experiment})
    stage.roll_out("shadowed")
    cast = stage.artifacts.cast
    with agent.client() as client:
        for number, question in enumerate(cast.questions[:3], 1):
            answer = client.generate(
                messages=cast.prompt(question), max_tokens=6, temperature=0.0, adapter="beta"
            )
            assert answer.provenance.arm.name == "control"
            await_value(lambda n=number: counted(stage)["compared"] == n, "a comparison", 60.0)
    found = counted(stage)
    assert found["offered"] == found["exact"] == 3
    assert found["scored_tokens"] == found["agreed_tokens"] == found["answer_tokens"]
    assert all(question not in agent.daemon.log.read_text() for question in cast.questions)


def counted(stage) -> dict[str, float]:
    (shown,) = stage.fleet.operator("experiments", "show", "beta")
    by_name = {arm["name"]: arm for arm in shown["arms"]}
    return {"compared": 0, **by_name["candidate"].get("shadow", {})}
