"""Answers by our client and by OpenAI's, over TensorRT Edge-LLM's runtime as an emulator."""

from __future__ import annotations

import threading
import time

import openai
import pytest

from remora_agent.client import Client
from remora_agent.edgellm.bundle import EdgeBundle
from remora_agent.edgellm.child import Patience
from remora_contract.errors import (
    DeadlineExceeded,
    EngineFault,
    Incompatible,
    PromptTooLong,
    RemoraError,
    RequestInvalid,
    Unsupported,
)


def ask(client: Client, prompt: str = "hello", **more) -> str:
    return client.generate(prompt, **{"max_tokens": 6, "temperature": 0.0, **more}).text


def until(look, within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while not look():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_base_adapter_and_use_case_answer_with_their_provenance(served):
    base = served.client.generate("hello", max_tokens=6)
    tuned = served.client.generate("hello", max_tokens=6, adapter="a")
    by_name = served.client.generate("hello", max_tokens=6, use_case="uc")
    assert len(base.text) == 6
    assert base.text != tuned.text == by_name.text
    assert tuned.provenance.adapters[0].digest == served.world.adapter("a").digest
    assert (base.usage.prompt_tokens, base.usage.completion_tokens) == (5, 6)
    assert base.provenance.bundle_digest == served.world.bundle("base").digest


def test_an_answer_is_streamed_as_the_runtime_gives_it(served, monkeypatch):
    monkeypatch.setenv("EMULATED_EDGELLM", "slow")
    restart(served)
    deltas = [e.text for e in served.client.stream("hello", max_tokens=6) if hasattr(e, "text")]
    assert len([d for d in deltas if d]) > 1
    assert "".join(deltas) == ask(served.client)


def test_openais_client_completes_chats_and_names_adapters_as_models(served):
    url = f"http://{served.stack.openai_address.target()}/v1"
    with openai.OpenAI(base_url=url, api_key="none") as client:
        names = {m.id for m in client.models.list()}
        assert {"base", "a", "uc"} <= names
        whole = client.completions.create(model="a", prompt="hello", max_tokens=6)
        assert whole.choices[0].text == ask(served.client, adapter="a")
        chat = client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=4, stream=True
        )
        pieces = [c.choices[0].delta.content or "" for c in chat if c.choices]
        assert "".join(pieces) == ask(served.client, "u:hi\na:", max_tokens=4)
        with pytest.raises(openai.APIStatusError, match="logit_bias: not with backend edgellm"):
            client.completions.create(model="a", prompt="x", logit_bias={"5": 1.0})


def test_a_stop_string_is_cut_off_and_named(served):
    whole = ask(served.client)
    result = served.client.generate("hello", max_tokens=6, stop=[whole[2:4]])
    assert result.text == whole[:2]
    assert result.stop_match == whole[2:4]


def test_a_prompt_longer_than_the_engine_was_built_for_is_refused(served):
    with pytest.raises(PromptTooLong, match="built for prompts of 128"):
        ask(served.client, "x" * 140)


def test_an_engine_that_adds_its_own_first_token_is_asked_without_ours_or_refused(
    served, world, monkeypatch
):
    """Prompts are never read otherwise than the bundle's tokenizer does."""
    monkeypatch.setenv("EMULATED_EDGELLM", "adds_bos")
    with pytest.raises(RequestInvalid, match="5 tokens with the bundle's tokenizer and 6"):
        restart(served)
        ask(served.client)


def test_a_first_token_that_the_engine_adds_is_not_said_twice(stack, world, monkeypatch):
    monkeypatch.setenv("EMULATED_EDGELLM", "adds_bos")
    world.bos = 256
    with pytest.raises(RequestInvalid, match="1 tokens with the bundle's tokenizer and 2"):
        stack.host.switch(world.assignment())  # its probe has no such token
    monkeypatch.setattr(EdgeBundle, "probe_prompt", "<eos>1")
    stack.host.switch(world.assignment())
    with Client(stack.test_address, timeout_s=60) as client:
        assert client.generate("<eos>hello", max_tokens=6).usage.prompt_tokens == 6


def restart(served) -> None:
    """By the adapter of a new release; its own proof is not asked here."""
    served.stack.host.switch(served.world.assignment("two", adapters=[("a", "r1"), ("b", "r1")]))


def test_a_new_adapter_restarts_the_runtime_and_no_request_is_lost(served, monkeypatch):
    monkeypatch.setenv("EMULATED_EDGELLM", "slow")
    restart(served)  # from now on a token takes a while
    answers: list[str] = []

    def load() -> None:
        with Client(served.stack.test_address, timeout_s=60) as client:
            answers.extend(ask(client, adapter="a", max_tokens=10) for _ in range(4))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    before = served.stack.host.metrics()["runtime_restarts"]
    served.stack.host.switch(served.world.assignment("three", adapters=[("a", "r1"), ("c", "r1")]))
    for thread in threads:
        thread.join()
    assert served.stack.host.metrics()["runtime_restarts"] == before + 1
    assert len(answers) == 12
    assert len(set(answers)) == 1
    assert ask(served.client, adapter="c") != ask(served.client, adapter="a")


def test_several_new_adapters_come_in_by_one_restart(served):
    more = [(name, "r1") for name in "abcd"]
    served.stack.host.switch(served.world.assignment("two", adapters=more))
    metrics = served.stack.host.metrics()
    assert (metrics["runtime_restarts"], metrics["adapters_in_bank"]) == (1, 4)
    assert len({ask(served.client, adapter=name) for name, _ in more}) > 1


def test_a_runtime_that_stands_still_is_killed_and_comes_back(stack, world):
    stack.host._models._patience = Patience(silent_s=1.0)
    stack.host.switch(world.assignment())
    with Client(stack.test_address, timeout_s=60) as client:
        with pytest.raises(EngineFault, match="said nothing for 1 s while answering"):
            ask(client, "HANG")
        assert len(ask(client)) == 6


def test_a_runtime_that_hangs_does_not_keep_the_agent_from_ending(served):
    def hang() -> None:
        with Client(served.stack.test_address, timeout_s=60) as client, pytest.raises(RemoraError):
            ask(client, "HANG")

    thread = threading.Thread(target=hang)
    thread.start()
    until(lambda: served.client.status().rows_busy == 1)
    began = time.monotonic()
    served.stack.host.drain(0.2)
    served.stack.stop(0.2)
    thread.join(30)
    assert not thread.is_alive()
    assert time.monotonic() - began < 30


def test_a_crash_costs_the_request_that_ran_and_the_runtime_comes_back(served):
    expected = ask(served.client, adapter="a")
    with pytest.raises(EngineFault, match=r"ended \(status 134\)"):
        ask(served.client, "CRASH")
    assert ask(served.client, adapter="a") == expected
    assert served.stack.host.healthy()
    assert served.stack.host.metrics()["engine_faults"] == 1


def test_an_error_of_the_runtime_is_told_and_costs_no_restart(served):
    before = served.stack.host.metrics()["runtime_restarts"]
    with pytest.raises(EngineFault, match="illegal memory access"):
        ask(served.client, "RAISE")
    assert ask(served.client)
    assert served.stack.host.metrics()["runtime_restarts"] == before


def test_a_deadline_ends_an_answer_and_the_next_one_is_whole(served, monkeypatch):
    monkeypatch.setenv("EMULATED_EDGELLM", "slow")
    restart(served)
    failures = served.stack.host.metrics()["failures"]
    hasty = Client(served.stack.test_address, timeout_s=0.5)
    with hasty, pytest.raises(DeadlineExceeded):
        ask(hasty, max_tokens=200)  # of which one takes 0.05 s
    until(lambda: served.stack.host.metrics()["failures"] == failures + 1, within_s=8.0)
    assert len(ask(served.client)) == 6


def test_status_and_metrics_say_what_answers(served):
    ask(served.client)
    status = served.client.status()
    assert status.backend == "edgellm 0.11.0"
    assert status.rows == 1
    metrics = served.stack.host.metrics()
    assert metrics["ttft_s"] > 0
    assert metrics["tokens"] >= 6
    assert metrics["adapters_in_bank"] == 1
    assert metrics["runtime_restarts"] == 0, "it was opened with the release's adapters"


def test_another_bundle_is_opened_in_place_of_the_old_one(served):
    served.stack.host.switch(served.world.assignment("two", bundle="other"))
    assert served.client.generate("hi", max_tokens=2).provenance.bundle_digest == (
        served.world.bundle("other").digest
    )


def test_requests_that_wait_while_the_bundle_changes_are_answered_by_the_new_one(
    served, monkeypatch
):
    monkeypatch.setenv("EMULATED_EDGELLM", "slow")
    restart(served)
    answers = []

    def one(tokens: int) -> None:
        with Client(served.stack.test_address, timeout_s=60) as client:
            answers.append(client.generate("hello", max_tokens=tokens))

    # The first runs for seconds: the others are to wait behind it, however slow the machine is.
    threads = [threading.Thread(target=one, args=(n,)) for n in (100, 10, 10, 10, 10)]
    threads[0].start()
    until(lambda: served.client.status().rows_busy == 1)
    for thread in threads[1:]:
        thread.start()
    until(lambda: served.client.status().queued == 4)
    served.stack.host.switch(served.world.assignment("three", bundle="other"))
    for thread in threads:
        thread.join()
    assert len({a.text[:10] for a in answers}) == 1
    digests = [a.provenance.bundle_digest for a in answers]
    assert digests.count(served.world.bundle("other").digest) == 4


def test_a_caller_who_leaves_ends_his_answer(served, monkeypatch):
    monkeypatch.setenv("EMULATED_EDGELLM", "slow")
    restart(served)
    with served.client.stream("hello", max_tokens=200) as stream:  # of which one takes 0.05 s
        next(iter(stream))
    until(lambda: served.client.status().rows_busy == 0, within_s=8.0)
    assert len(ask(served.client)) == 6


def test_a_bundle_that_does_not_open_leaves_the_old_one_serving(served):
    served.world.engine = {"broken": b"BROKEN"}
    with pytest.raises(EngineFault, match="plan file does not match"):
        served.stack.host.switch(served.world.assignment("two", bundle="broken"))
    assert ask(served.client, adapter="a")


def test_an_engine_of_another_version_is_refused_before_it_is_opened(stack, world):
    world.notes = {"base": {"version": "0.10.0"}}
    with pytest.raises(Incompatible, match=r"tensorrt-edgellm 0\.10\.0, has 0\.11\.0"):
        stack.host.switch(world.assignment())


def test_a_device_without_a_gpu_says_so_with_the_runtimes_reason(stack, world, monkeypatch):
    monkeypatch.setenv("EMULATED_EDGELLM", "no_gpu")
    with pytest.raises(Unsupported, match=r"cannot run on this device.*library 'cuda'"):
        stack.host.switch(world.assignment())
