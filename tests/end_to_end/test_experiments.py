"""An A/B test as an engineer runs it: sessions on two devices, counts, other shares, a restart, and
the winner under the name, while clients ask all the time."""

from __future__ import annotations

import pytest

from examples.demo.processes import DemoFailed, await_value
from remora_contract.experiments import Arm, Experiment, assign
from tests.end_to_end.load import Load

pytestmark = pytest.mark.slow

SESSIONS = [f"session-{i}" for i in range(10)]
RULES = {"errors": "candidate.failures / candidate.requests < 0.01"}
MIN_REQUESTS = 20


def declared(share: int) -> Experiment:
    arms = (Arm("control", 100 - share, adapter="beta"), Arm("candidate", share, adapter="next"))
    return Experiment("beta", arms, "spring")


def release(stage, name: str, share: int, **more: object) -> None:
    arms = {
        "control": {"adapter": "beta", "percent": 100 - share},
        "candidate": {"adapter": "next", "percent": share},
    }
    experiment = {
        "salt": "spring", "arms": arms, "promote": RULES, "min_requests": MIN_REQUESTS, **more,
    }  # fmt: skip
    # Both artifacts are of revision 1: the name's new bytes must get a revision of their own.
    adapters = {"beta": "beta@1", "next": "alpha@1"}
    stage.release_file(name, adapters, experiments={"beta": experiment})


def arms_heard(load: Load, agent) -> list[tuple[str, str, str]]:
    """Session, arm, digest: of each answer, in order."""
    heard = sorted((h for h in load.heard if h.agent == agent.name), key=lambda h: h.began_s)
    found = []
    for i, one in enumerate(heard):
        assert one.result is not None, one.error
        provenance = one.result.provenance
        arm = provenance.arm.name if provenance.arm is not None else ""
        (adapter,) = provenance.adapters
        found.append((SESSIONS[i % len(SESSIONS)], arm, adapter.digest))
    return found


def counted(stage) -> dict[str, int]:
    (found,) = stage.fleet.operator("experiments", "show", "beta")
    return {arm["name"]: int(arm["counts"].get("requests", 0)) for arm in found["arms"]}


def await_answers(load: Load, agents) -> None:
    """Every session has asked every agent twice from now on."""
    known = {a.name: len(load.of(a)) for a in agents}
    more = 2 * len(SESSIONS)
    await_value(
        lambda: all(len(load.of(a)) >= known[a.name] + more for a in agents), "answers", 60.0
    )


def await_counted(stage, total: int) -> None:
    await_value(lambda: sum(counted(stage).values()) == total, f"{total} requests", 60.0)


def check_arms(load: Load, agent, digest_of: dict[str, str], *shares: int) -> int:
    """Every session was answered by its arm of the shares before or after, in the end after.
    Returns how many answers there were."""
    arms = [{s: assign(declared(share), s).name for s in SESSIONS} for share in shares]
    assert set(arms[-1].values()) == {"control", "candidate"}, "choose other shares"
    heard = arms_heard(load, agent)
    assert all(digest == digest_of[arm] for _, arm, digest in heard)
    assert all(arm in {a[session] for a in arms} for session, arm, _ in heard)
    assert all(arm == arms[-1][session] for session, arm, _ in heard[-len(SESSIONS) :])
    return len(heard)


def check_restarts(stage, agent, ask, total: int) -> None:
    """No count falls when an agent is stopped, or killed, and none is counted twice."""
    stage.fleet.stop(agent)
    restart(stage, agent)
    assert sum(counted(stage).values()) == total
    with agent.client() as client:
        client.generate(**ask)
    await_counted(stage, total + 1)
    agent.daemon.kill()  # it forgets what it had not written down; the controller does not
    restart(stage, agent)
    with agent.client() as client:
        for asked in range(1, 6):
            client.generate(**ask)
            assert total + 1 <= sum(counted(stage).values()) <= total + 1 + asked


def restart(stage, agent) -> None:
    stage.fleet.restart(agent)
    await_value(lambda: agent.events("release.switched"), "it serves again", 60.0)


def check_promotion(stage, agents, asks, winner: str) -> None:
    """The winner answers under the name, no request was lost, nothing was shipped or built."""
    plan = stage.fleet.operator("experiments", "promote", "beta", "--dry-run")["plan"]
    assert [(d["ship_bytes"], d["builds_engine"]) for d in plan["devices"]] == [(0, False)] * 2
    with Load(agents, asks) as load:
        made = stage.fleet.operator(
            "experiments", "promote", "beta", "--wave", "1", "--soak", "0.5"
        )
        ended = stage.ended(made["rollout"]["rollout_id"])
        await_answers(load, agents)
    assert (ended["state"], load.complaints()) == ("COMPLETED", []), ended
    for agent in agents:
        *_, (_, arm, digest) = heard = arms_heard(load, agent)
        assert (arm, digest) == ("", winner)
        assert {a for _, a, _ in heard} - {""} <= {"control", "candidate"}
        assert len(load.of(agent)[-1].token_ids) == 4
        built = agent.events("engine.built")
        assert len(built) == (1 if agent is agents[0] else 0), "nothing here costs an engine build"


def test_sessions_are_split_counted_and_the_winner_becomes_the_name_without_a_lost_request(stage):
    agents = stage.join("one", "two")
    digests = stage.artifacts.built.digests()
    digest_of = {"control": digests["beta-1"], "candidate": digests["alpha"]}
    release(stage, "ab", 30)
    stage.roll_out("ab")
    cast = stage.artifacts.cast
    prompt = cast.prompt(cast.questions[0])
    asks = [
        {"messages": prompt, "max_tokens": 4, "temperature": 0.0, "adapter": "beta", "session": s}
        for s in SESSIONS
    ]
    with Load(agents, asks) as load:
        await_answers(load, agents)
    answers = sum(check_arms(load, a, digest_of, 30) for a in agents)
    await_counted(stage, answers)
    release(stage, "more", 60)
    with Load(agents, asks) as load:
        stage.roll_out("more", "--wave", "1")
        await_answers(load, agents)
    answers += sum(check_arms(load, a, digest_of, 30, 60) for a in agents)
    await_counted(stage, answers)

    check_restarts(stage, agents[1], asks[0], answers)
    (shown,) = stage.fleet.operator("experiments", "list")
    assert (shown["devices"], shown["verdict"], shown["candidate"]) == (2, "PASS", "candidate")
    candidate = shown["arms"][1]
    assert (candidate["devices"], candidate["counts"]["unkeyed"]) == (2, 0)
    assert candidate["statistics"]["mean_answer_s"] > candidate["statistics"]["mean_first_token_s"]
    check_promotion(stage, agents, asks, digests["alpha"])
    assert stage.fleet.operator("experiments", "list") == []


def test_an_arm_without_evidence_is_not_promoted_and_one_with_it_promotes_itself(stage):
    agents = stage.join("one")
    release(stage, "ab", 50)
    stage.roll_out("ab")
    with pytest.raises(DemoFailed, match="candidate has 0 of 20 requests"):
        stage.shop.run("remora", "experiments", "promote", "beta")
    release(stage, "auto", 50, promote_when="pass")
    stage.roll_out("auto")
    cast = stage.artifacts.cast
    asks = [
        {"messages": cast.prompt(cast.questions[0]), "max_tokens": 2, "adapter": "beta"},
    ]
    with Load(agents, asks) as load:  # without a session each request draws
        await_value(lambda: stage.fleet.operator("experiments", "list") == [], "a winner", 90.0)
    assert load.complaints() == []
    arms = [r.provenance.arm.name for r in load.of(agents[0]) if r.provenance.arm is not None]
    assert arms.count("candidate") >= MIN_REQUESTS and "control" in arms
    newest, *_ = stage.fleet.operator("rollout", "list")
    assert (newest["created_by"], newest["release_name"]) == ("controller", "auto")
    assert stage.ended(newest["rollout_id"])["state"] == "COMPLETED"
    audited = stage.fleet.operator("audit")
    assert any(e["what"] == "PromoteExperiment" and e["who"] == "controller" for e in audited)
