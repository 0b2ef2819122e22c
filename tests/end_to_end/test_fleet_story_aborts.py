"""An abort finds a real device in every phase that can be held; ADMITTED, STAGED and BUILT, which
last milliseconds, are in tests/agent/control/test_aborted.py."""

from __future__ import annotations

import pytest

from tests.end_to_end import holding
from tests.end_to_end.deep import DEEP
from tests.end_to_end.load import Load

pytestmark = pytest.mark.slow

PHASES = {
    "STAGING": holding.slow_download,
    "BUILDING": holding.stopped_build,
    "PROVING": holding.stopped_proof,
    "WAIT_WINDOW": holding.closed_window,
    "SWITCHING": holding.stopped_switch,
    "SOAKING": holding.long_soak,
}
HELLO = {"prompt": "Say hello in Italian.", "max_tokens": 8, "temperature": 0.0}


@pytest.fixture
def told(deep_stage):
    """A device that serves `good`, another that must not be touched, and releases of each model."""
    stage = deep_stage
    agent, other = stage.join("one", "other")
    stage.release("good", stage.artifacts.bundle.reference)
    stage.roll_out("good")
    stage.release("deep", DEEP)
    return stage, agent, other


def test_an_abort_takes_the_device_back_from_every_phase(told):
    stage, agent, other = told
    with Load([agent, other], [HELLO]) as load:
        for phase, hold in PHASES.items():
            before = len(stage.phases(agent, "deep"))
            ended = _abort(stage, agent, "deep", hold)
            assert ended["state"] == "ABORTED", (phase, ended)
            assert [d["outcome"] for d in ended["devices"]] == ["reverted"], (phase, ended)
            went = stage.phases(agent, "deep")[before:]
            assert went[0] == "ASSIGNED" and phase in went[-2:], went
            assert went[-1] == phase or (phase, went[-1]) == ("SWITCHING", "SOAKING"), went
            assert stage.running() == {"good"}
    assert load.complaints() == []
    assert len({r.provenance.bundle_digest for r in load.of(other)}) == 1
    assert stage.phases(other, "deep") == []


def test_an_abort_that_keeps_lets_the_device_finish_from_every_phase(told):
    stage, agent, other = told
    stage.release("good-beta", stage.artifacts.bundle.reference, "beta-2")
    forward = {
        "BUILDING": ("deep", holding.stopped_build),
        "STAGING": ("good-beta", holding.slow_download),
        "PROVING": ("deep", holding.stopped_proof),
        "WAIT_WINDOW": ("good", holding.lock),
        "SWITCHING": ("deep", holding.stopped_switch),
        "SOAKING": ("good", holding.long_soak),
    }
    with Load([agent, other], [HELLO]) as load:
        for phase, (name, hold) in forward.items():
            ended = _abort(stage, agent, name, hold, "--keep")
            assert ended["state"] == "ABORTED", (phase, ended)
            assert [d["outcome"] for d in ended["devices"]] == ["succeeded"], (phase, ended)
            assert stage.phases(agent, name)[-1] == "COMMITTED", phase
            assert stage.running() == {name, "good"}, phase
    assert load.complaints() == []
    assert len({r.provenance.bundle_digest for r in load.of(other)}) == 1


def _abort(stage, agent, name, hold, *options):
    """Starts, and aborts while the device is held in the phase; the rollout's end. Only what keeps
    the release, and a switch that is under way, wait for the device to be let go."""
    with hold(stage, agent) as held:
        rollout = stage.start(name, "--selector", f"name={agent.name}", *held.options)
        held.wait()
        stage.shop.run("remora", "rollout", "abort", rollout, *options)
        if not options and hold is not holding.stopped_switch:
            return stage.ended(rollout)
    return stage.ended(rollout)
