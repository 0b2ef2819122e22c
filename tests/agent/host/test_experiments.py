"""A/B on the real engine, over all three surfaces, with clients that others wrote."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import httpx
import openai
import pytest
import tritonclient.grpc as triton

from remora_agent.client import Client
from remora_agent.engine.opening import EngineOptions
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_agent.serving.address import TcpAddress
from remora_agent.serving.openai.settings import OpenAiOptions
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_agent.telemetry.serving import serving_readings
from remora_contract.errors import RequestInvalid
from remora_contract.experiments import ARM_COUNTS, Arm, Experiment, assign
from remora_contract.release import ReleaseUseCase, WeightedName
from tests.support.triton import inputs

LOOPBACK = TcpAddress("127.0.0.1", 0)
OPTIONS = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
AB = Experiment("a", (Arm("old", 70, adapter="a"), Arm("new", 30, adapter="b")), "s")
MIXED = Experiment(
    "support", (Arm("alone", 50, adapter="b"), Arm("both", 50, use_case="both")), "s"
)
SESSIONS = [f"session-{i}" for i in range(12)]


@pytest.fixture(scope="module")
def served(real_bundles) -> Iterator[SimpleNamespace]:
    settings = EngineSettings(
        cache_dir=real_bundles.cache, options=EngineOptions(rows=4, threads=1)
    )
    options = StackOptions(LOOPBACK, engines=settings, openai=OpenAiOptions(LOOPBACK))
    stack = ServingStack(options, engines=CachedEngines(settings))
    address = stack.start().target()
    plain = real_bundles.assignment("plain", real_bundles.plain, "r1")
    release = replace(
        plain,
        release_id="experiment",
        use_cases=(ReleaseUseCase("both", (WeightedName("a", 0.5), WeightedName("b", 0.5))),),
        experiments=(AB, MIXED),
    )
    stack.host.prove(release, lambda phase, done: None)
    stack.host.switch(release)
    url = f"http://{stack.openai_address.target()}"
    with Client(address, timeout_s=60) as client, triton.InferenceServerClient(address) as kserve:
        yield SimpleNamespace(
            host=stack.host,
            release=release,
            plain=plain,
            client=client,
            kserve=kserve,
            openai=openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0),
            url=url,
            digests={a.name: a.digest for a in release.adapters},
            base=client.status().model_name,
        )
    stack.stop(5.0)


def arms_of(served: SimpleNamespace) -> dict[str, str]:
    """By each surface: which arm answered the sessions, checked against the adapter's digest."""
    return {s: assign(AB, s).name for s in SESSIONS}


def test_every_surface_gives_a_session_the_same_arm(served):
    wanted = arms_of(served)
    assert set(wanted.values()) == {"old", "new"}
    adapter_of = {"old": served.digests["a"], "new": served.digests["b"]}
    for session, arm in wanted.items():
        native = served.client.generate("hello", adapter="a", session=session, **OPTIONS)
        assert (native.provenance.arm.experiment, native.provenance.arm.name) == ("a", arm)
        assert [a.digest for a in native.provenance.adapters] == [adapter_of[arm]]
        result = served.kserve.infer(
            f"{served.base}:a", inputs("hello", max_tokens=6, session=session)
        )
        assert result.as_numpy("experiment").tolist() == [b"a"]
        assert result.as_numpy("arm").tolist() == [arm.encode()]
        assert result.as_numpy("adapter_digests").tolist() == [adapter_of[arm].encode()]
        assert result.as_numpy("text_output")[0].decode() == native.text
        reply = served.openai.completions.create(
            model="a",
            prompt="hello",
            max_tokens=6,
            temperature=0,
            extra_headers={"X-Session-Id": session},
            extra_body={"ignore_eos": True},
        )
        said = reply.model_extra["experiment"]
        assert (said["name"], said["arm"]) == ("a", arm)
        assert [a["digest"] for a in said["adapters"]] == [adapter_of[arm]]
        assert reply.choices[0].text == native.text


def test_an_arm_answers_as_its_adapter_does_alone(served):
    for session in SESSIONS[:6]:
        got = served.client.generate("once upon", adapter="a", session=session, **OPTIONS)
        alone = "b" if assign(AB, session).name == "new" else "a@r1"
        wanted = served.client.generate("once upon", adapter=alone, **OPTIONS)
        assert got.token_ids == wanted.token_ids
        assert wanted.provenance.arm is None


def test_the_user_stands_for_a_session_and_the_session_wins(served):
    wanted = arms_of(served)
    for session in SESSIONS[:4]:
        native = served.client.generate("hi", adapter="a", client=session, **OPTIONS)
        chat = served.openai.completions.create(
            model="a", prompt="hi", max_tokens=2, user=session, stream=True
        )
        arms = {chunk.model_extra["experiment"]["arm"] for chunk in chat}
        assert {native.provenance.arm.name} == arms == {wanted[session]}
        for other in SESSIONS[4:8]:
            both = served.client.generate(
                "hi", adapter="a", client=other, session=session, **OPTIONS
            )
            assert both.provenance.arm.name == wanted[session]


def test_without_a_session_each_request_draws_and_all_its_answers_are_of_one_arm(served):
    drawn = Counter()
    for _ in range(25):
        result = served.client.generate("hi", adapter="a", n=2, max_tokens=1, temperature=1.0)
        arms = {r.provenance.arm.name for r in (result, *result.more)}
        assert len(arms) == 1
        drawn.update(arms)
    assert set(drawn) == {"old", "new"}
    reply = served.openai.completions.create(model="a", prompt=["x", "y"], n=3, max_tokens=1)
    assert len(reply.choices) == 6
    assert len(reply.model_extra["experiment"]["adapters"]) == 1


def test_more_than_the_name_is_answered_by_what_it_names(served):
    for choice in ({"adapter": "a@r1"}, {"adapter": {"a": 0.5}}, {"adapter": {"a": 1.0, "b": 1.0}}):
        result = served.client.generate("hi", session=SESSIONS[0], **choice, **OPTIONS)
        assert result.provenance.arm is None
    result = served.kserve.infer(
        f"{served.base}:a", inputs("hi", session=SESSIONS[0]), model_version="r1"
    )
    assert result.as_numpy("arm").tolist() == []
    with pytest.raises(RequestInvalid, match="support is an experiment"):
        served.client.generate("hi", adapter={"support": 0.5, "a": 1.0}, **OPTIONS)
    with pytest.raises(RequestInvalid, match="cannot be compared"):
        served.client.embed("hi", adapter="a")
    assert served.client.embed("hi", adapter="a@r1").vectors


def test_a_use_case_may_be_an_arm_and_a_name_may_be_the_experiments_alone(served):
    arms = Counter()
    for session in SESSIONS:
        result = served.client.generate("hi", use_case="support", session=session, **OPTIONS)
        arm = result.provenance.arm.name
        arms[arm] += 1
        assert len(result.provenance.adapters) == (2 if arm == "both" else 1)
        reply = served.openai.completions.create(
            model="support", prompt="hi", max_tokens=1, extra_body={"session": session}
        )
        assert reply.model_extra["experiment"]["arm"] == arm
    assert set(arms) == {"alone", "both"}
    listed = {m.id: m.model_extra for m in served.openai.models.list()}
    assert listed["support"]["experiment"]["arms"]["both"] == {"use_case": "both", "percent": 50}
    assert set(listed) >= {"a", "b", "both", "support"}
    index = served.kserve.get_model_repository_index()
    assert ("support", "experiment") in {(m.name.split(":")[-1], m.version) for m in index.models}


def test_two_sessions_in_one_request_are_refused(served):
    answer = httpx.post(
        f"{served.url}/v1/completions",
        json={"model": "a", "prompt": "x", "session": "one"},
        headers={"X-Session-Id": "two"},
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "session"
    long = httpx.post(
        f"{served.url}/v1/completions",
        json={"model": "a", "prompt": "x"},
        headers={"X-Session-Id": "x" * 300},
    )
    assert long.status_code == 400


def test_arms_are_counted_by_what_they_run_and_only_while_they_run_it(served):
    host, client = served.host, served.client

    def counts() -> dict[str, float]:
        told = {r.wire_name: r.value for r in serving_readings(host.metrics())}
        return {n: v for n, v in told.items() if n.startswith("experiment_")}

    before = counts()
    assert len(before) == 4 * len(ARM_COUNTS)
    session = next(s for s in SESSIONS if assign(AB, s).name == "new")
    client.generate("hi", adapter="a", session=session, **OPTIONS)
    grown = {n.partition(".")[0]: v - before[n] for n, v in counts().items() if v != before[n]}
    assert grown.pop("experiment_first_token_seconds_total") > 0
    assert grown.pop("experiment_answer_seconds_total") > 0
    assert grown == {"experiment_requests_total": 1, "experiment_tokens_total": 6}

    moved = client.register_adapter("b", str(served.release.adapters[0].directory), "other")
    client.set_alias("b", moved.revision)
    client.generate("hi", adapter="a", session=session, **OPTIONS)
    assert counts()["experiment_requests_total" + _label(before, "a/new")] == (
        before["experiment_requests_total" + _label(before, "a/new")] + 1
    )
    client.set_alias("b", "r1")


def test_a_request_that_was_given_up_is_no_fast_answer(served):
    def counts() -> dict[str, float]:
        told = {r.wire_name: r.value for r in serving_readings(served.host.metrics())}
        return {n: v for n, v in told.items() if n.startswith("experiment_")}

    before = counts()
    options = {**OPTIONS, "max_tokens": 100}
    stream = served.client.stream("hi", adapter="a", session=SESSIONS[0], **options)
    next(iter(stream))
    stream.cancel()
    deadline = time.monotonic() + 20.0
    while (now := counts()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    grown = {n.partition(".")[0]: v - before[n] for n, v in now.items() if v != before[n]}
    assert grown == {"experiment_requests_total": 1, "experiment_cancelled_total": 1}


def _label(counts: dict[str, float], arm: str) -> str:
    return next("." + n.partition(".")[2] for n in counts if n.partition(".")[2].startswith(arm))


def test_a_release_without_the_experiment_ends_it_and_brings_it_back(served):
    served.host.switch(served.plain)
    assert not [n for n in served.host.metrics() if n.startswith("experiment_")]
    result = served.client.generate("hi", adapter="a", session=SESSIONS[0], **OPTIONS)
    assert result.provenance.arm is None
    served.host.switch(served.release)
    again = served.client.generate("hi", adapter="a", session=SESSIONS[0], **OPTIONS)
    assert again.provenance.arm.name == arms_of(served)[SESSIONS[0]]
