"""Releases as a fleet lives through them: a good one, one that answers wrongly, one that is slow,
adapters and use cases under load, and a device that was away for three of them."""

from __future__ import annotations

import pytest

from examples.demo.processes import await_value
from examples.demo.traffic import Traffic, judge
from tests.end_to_end.deep import DEEP
from tests.end_to_end.load import Load

pytestmark = pytest.mark.slow

PACE = "pace: avg(tokens_per_s) > 0.6 * baseline(tokens_per_s) on_fail=rollback min_samples=2"
BASELINE_S = 6.0  # agents take a sample every second
OVERHEAD_BYTES = 64 << 10  # what an adapter release may ship beside the adapter


def test_a_slow_release_is_caught_while_it_soaks_and_a_good_one_passes_the_same_gate(deep_stage):
    stage = deep_stage
    agents = stage.join("one", "two")
    stage.release("good", stage.artifacts.bundle.reference, "alpha", "beta-1")
    stage.roll_out("good")
    with Load(agents, _questions(stage)) as load:
        await_value(lambda: load.seconds() > BASELINE_S, "answers for some seconds", 60.0)
        _await_measured(stage, 4)
        stage.release("better", stage.artifacts.bundle.reference, "alpha", "beta-2")
        better = stage.ended(stage.start("better", "--soak", "4", "--gate", PACE))
        assert better["state"] == "COMPLETED", better
        stage.release("slow", DEEP)
        slow = stage.ended(stage.start("slow", "--wave", "1", "--soak", "25", "--gate", PACE))
    assert (slow["state"], load.complaints()) == ("ROLLED_BACK", []), slow
    assert "gate pace fails on wave 1" in slow["reason"]
    assert sorted(d["outcome"] for d in slow["devices"]) == ["reverted", "waiting"]
    (tried,) = [a for a in agents if "SOAKING" in stage.phases(a, "slow")]
    assert stage.phases(tried, "slow")[-1] == "SOAKING", "it must not have been committed"
    bundles = {a.name: {r.provenance.bundle_digest for r in load.of(a)} for a in agents}
    assert {n: len(b) for n, b in bundles.items()} == {
        a.name: 2 if a is tried else 1 for a in agents
    }
    assert stage.running() == {"better"}
    for agent in agents:
        stage.ask(agent, stage.artifacts.cast.variants(2))


def test_an_adapter_that_answers_wrongly_is_caught_before_it_serves(stage):
    agents = stage.join("one", "two")
    golden = _golden(stage, "beta-1")
    stage.release_file("good", {"alpha": "alpha", "beta": "beta@1"}, gates={"golden": golden})
    stage.roll_out("good")
    stage.release_file("bad", {"alpha": "alpha", "beta": "beta@2"}, gates={"golden": golden})
    with Traffic(agents, stage.artifacts.cast) as traffic:
        ended = stage.ended(stage.start("bad", "--wave", "1"))
    assert ended["state"] == "ROLLED_BACK"
    assert sorted(d["outcome"] for d in ended["devices"]) == ["reverted", "waiting"]
    (failed,) = [d for d in ended["devices"] if d["outcome"] == "reverted"]
    assert "golden" in failed["error"] and "capital" in failed["error"], failed
    verdict = judge(traffic.requests, stage.artifacts.cast, stage.artifacts.built.digests())
    assert verdict.complaints == ()
    assert "beta-2" not in verdict.answered_by, "a wrong answer reached a client"
    assert {p for a in agents for p in stage.phases(a, "bad")}.isdisjoint({"SWITCHING", "SOAKING"})
    assert stage.running() == {"good"}


def test_adapters_and_use_cases_change_under_load_with_no_build_and_no_lost_request(stage):
    agents = stage.join("one", "two")
    stage.release_file("first", {"alpha": "alpha", "beta": "beta@1"}, use_cases=_mix(1.0))
    stage.roll_out("first")
    digests = stage.artifacts.built.digests()
    with Load(agents, [{**q, "use_case": "both"} for q in _questions(stage)]) as load:
        stage.release_file("second", {"alpha": "alpha", "beta": "beta@2"}, use_cases=_mix(0.5))
        plan = stage.fleet.operator("plan", "second")
        await_value(lambda: all(map(load.of, agents)), "answers before it", 60.0)
        stage.roll_out("second", "--wave", "1")
        answered = {a.name: len(load.of(a)) for a in agents}
        await_value(
            lambda: all(len(load.of(a)) > answered[a.name] + 1 for a in agents),
            "an answer begun after it",
            60.0,
        )
    assert load.complaints() == []
    before = {("alpha", digests["alpha"], 1.0), ("beta", digests["beta-1"], 1.0)}
    after = {("alpha", digests["alpha"], 0.5), ("beta", digests["beta-2"], 1.0)}
    for agent in agents:
        mixes = [
            {(a.name, a.digest, a.weight) for a in result.provenance.adapters}
            for result in load.of(agent)
        ]
        assert mixes == [before] * mixes.count(before) + [after] * mixes.count(after)
        assert before in mixes and after in mixes
        assert len(agent.events("engine.built")) == 1, "an adapter must not cost an engine build"
    adapter = stage.artifacts.built.adapters["beta-2"].bytes
    for device in plan["devices"]:
        assert adapter <= int(device["ship_bytes"]) < adapter + OVERHEAD_BYTES
    for agent in agents:
        fetched = agent.events("artifact.fetched")[-1]
        assert (fetched["digest"], fetched["bytes"]) == (
            digests["beta-2"],
            int(plan["devices"][0]["ship_bytes"]),
        )


def test_a_device_that_was_away_for_three_releases_goes_to_the_newest_in_one_switch(deep_stage):
    stage = deep_stage
    here, away = stage.join("here", "away")
    stage.release("zero", stage.artifacts.bundle.reference, "alpha", "beta-1")
    stage.roll_out("zero")
    stage.fleet.stop(away)
    stage.release("one", DEEP)
    stage.release_file("two", {}, bundle=DEEP, sampling={"temperature": 0.5})
    stage.release("three", stage.artifacts.bundle.reference, "alpha", "beta-2")
    for name in ("one", "two", "three"):
        stage.roll_out(name, "--wave", "100%")  # a first wave that is away would be waited for
        assert stage.running() == {name, "zero"}
    assert len(here.events("engine.built")) == 2, "the releases between are of another bundle"
    stage.fleet.restart(away)
    stage.await_running({"three"})
    assert [e["release"].rpartition("-")[0] for e in away.events("release.switched")] == [
        "zero",  # what it served, at its start
        "three",
    ]
    assert away.events("engine.built") == [], "nothing had to be built"
    (fetched,) = away.events("artifact.fetched")
    assert fetched["digest"] == stage.artifacts.built.adapters["beta-2"].digest
    stage.ask(away, stage.artifacts.cast.variants(2))


def _await_measured(stage, times: int) -> None:
    """Until the controller has heard of so many speeds of every device."""
    heard: dict[str, set[float]] = {}

    def look() -> bool:
        for row in stage.fleet.operator("top", "--once"):
            speeds = heard.setdefault(row["device"]["device_id"], set())
            speeds.add(row["metrics"].get("tokens_per_s", 0.0))
        return all(len(speeds - {0.0}) >= times for speeds in heard.values())

    await_value(look, "a baseline to compare with", 60.0)


def _questions(stage):
    """As arguments of `Client.generate`."""
    cast = stage.artifacts.cast
    return [
        {"messages": cast.prompt(q), "max_tokens": cast.max_tokens, "temperature": 0.0}
        for q in cast.questions
    ]


def _golden(stage, variant):
    """A release's question of its own: what the reference answers with this adapter."""
    cast = stage.artifacts.cast
    question = cast.questions[0]
    return [
        {
            "name": "capital",
            "kind": "exact",
            "tokens": _prompt_ids(cast, question),
            "expected_tokens": list(cast.oracle.reference.answers[variant][question].ids),
            "use_case": variant.partition("-")[0],
        }
    ]


def _mix(alpha):
    return {"both": {"alpha": alpha, "beta": 1.0}}


def _prompt_ids(cast, question):
    """As transformers renders and tokenizes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cast.checkpoint)
    text = tokenizer.apply_chat_template(
        cast.prompt(question), tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)
