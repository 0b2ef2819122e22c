"""A device that was away takes a release that its fleet has, and is judged by the gates alone."""

from __future__ import annotations

import pytest

from examples.demo.processes import await_value
from tests.end_to_end.load import Load

pytestmark = pytest.mark.slow

# Holds on a device that nobody asks anything, and on no other.
QUIET = "quiet: increase(requests_total) < 5 min_samples=2"


def test_a_device_that_was_away_goes_back_alone_when_a_gate_fails_on_it(deep_stage):
    stage = deep_stage
    here, away = stage.join("here", "away")
    bundle = stage.artifacts.bundle.reference
    stage.release("good", bundle, "alpha", "beta-1")
    stage.roll_out("good")
    stage.fleet.stop(away)
    stage.release("new", bundle, "alpha", "beta-2")
    # One wave: a first one that is away would be waited for.
    rollout = stage.start("new", "--soak", "12", "--wave", "100%", "--gate", QUIET)
    assert stage.ended(rollout)["state"] == "COMPLETED", "who is away holds up nobody"
    stage.fleet.restart(away)
    await_value(lambda: away.events("release.switched"), "it serves again", 60.0)
    cast = stage.artifacts.cast
    questions = [{"messages": cast.prompt(q), "max_tokens": 4} for q in cast.questions]
    with Load([away], questions) as load:
        await_value(
            lambda: _judged(stage, rollout).get("late") == "SENT_BACK", "it is sent back", 60.0
        )
        await_value(
            lambda: _running(stage, away) == "good", "it serves what it had", 60.0, stage.shop
        )
    # It serves what it had before it is through with the soak of going back.
    await_value(
        lambda: _judged(stage, rollout).get("outcome") == "reverted", "it settles", 60.0, stage.shop
    )
    assert load.complaints() == [], "no request was lost on the way there and back"
    assert _running(stage, here) == "new", "nobody else is touched"
    found = stage.fleet.operator("rollout", "status", rollout)
    assert found["state"] == "COMPLETED"
    assert "gate quiet fails" in _judged(stage, rollout)["late_detail"]
    (device,) = stage.fleet.operator("devices", "list", "--selector", "name=away")
    assert device["note"].startswith(f"sent back by a gate of rollout {rollout}")


def _judged(stage, rollout):
    found = stage.fleet.operator("rollout", "status", rollout)
    return next((d for d in found["devices"] if d["late"]), {})


def _running(stage, agent):
    (device,) = stage.fleet.operator("devices", "list", "--selector", f"name={agent.name}")
    return device["running_release_id"].rpartition("-")[0]
