"""Shadow inference on the real engine (ONNX Runtime): the numbers are those that anybody gets by
asking twice, and nobody who asks notices."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from remora_agent.client import Client
from remora_agent.engine.opening import EngineOptions
from remora_agent.hosting.engines import CachedEngines, EngineSettings
from remora_agent.local_host import HostSettings
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.address import TcpAddress
from remora_agent.serving.stack import ServingStack, StackOptions
from remora_contract.adapter import load_adapter
from remora_contract.errors import RequestInvalid, Unavailable
from remora_contract.experiments import SHADOW_COUNTS, Arm, Experiment, Shadow, is_compared
from remora_contract.release import ReleaseUseCase, WeightedName

OPTIONS = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}
SAME = Experiment(
    "same", (Arm("x", 100, adapter="a"), Arm("y", 0, adapter="a")), shadow=Shadow("x", "y", 100)
)
OTHER = Experiment(
    "other", (Arm("x", 100, adapter="a"), Arm("y", 0, adapter="b")), shadow=Shadow("x", "y", 100)
)


@pytest.fixture
def shadowed(real_bundles) -> Iterator[SimpleNamespace]:
    with served(real_bundles, RuntimeOptions(spare_after_s=0.0)) as made:
        yield made


@contextmanager
def served(real_bundles, runtime: RuntimeOptions) -> Iterator[SimpleNamespace]:
    settings = EngineSettings(
        cache_dir=real_bundles.cache, options=EngineOptions(rows=2, threads=1)
    )
    options = StackOptions(
        TcpAddress("127.0.0.1", 0), engines=settings, host=HostSettings(runtime=runtime)
    )
    stack = ServingStack(options, engines=CachedEngines(settings))
    address = stack.start().target()
    release = real_bundles.assignment("shadow", real_bundles.plain, "r1")
    release = replace(release, experiments=(SAME, OTHER))
    stack.host.build(release, lambda phase, done: None)
    stack.host.switch(release)

    def counts(experiment: str) -> dict[str, float]:
        label = f".{experiment}/y/"
        return {
            n.partition(".")[0].removeprefix("shadow_"): v
            for n, v in stack.host.metrics().items()
            if n.startswith("shadow_") and label in n
        }

    def settled(experiment: str, offered: int) -> dict[str, float]:
        """Once so many requests were chosen, and each has been compared or given up."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            found = counts(experiment)
            ends = sum(found[n] for n in ("compared", "skipped", "cancelled", "failed"))
            if found["offered"] == offered == ends and not leases():
                return found
            time.sleep(0.005)
        raise AssertionError(counts(experiment))

    def ended(experiment: str, offered: int) -> dict[str, float]:
        """The same of all that was ever counted under its name."""
        until = time.monotonic() + 20
        while time.monotonic() < until:
            kept = [c for (e, *_), c in stack.host._experiments._arms.items() if e == experiment]
            found = {n: sum(c["shadow_" + n] for c in kept) for n in SHADOW_COUNTS}
            ends = sum(found[n] for n in ("compared", "skipped", "cancelled", "failed"))
            if found["offered"] == offered == ends and not leases():
                return found
            time.sleep(0.005)
        raise AssertionError(found)

    def leases() -> float:
        return stack.host.metrics()["adapter_leases"]

    try:
        with Client(address, timeout_s=60) as client:
            yield SimpleNamespace(
                host=stack.host,
                release=release,
                client=client,
                address=address,
                counts=counts,
                settled=settled,
                ended=ended,
                leases=leases,
            )
    finally:
        stack.stop(5.0)


SCHEMA = '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}'


@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        {"max_tokens": 12, "temperature": 1.5},
        {"max_tokens": 12, "temperature": 1.5, "seed": 7, "repetition_penalty": 1.3},
        {"max_tokens": 30, "temperature": 1.0, "json_schema": SCHEMA},
        {"max_tokens": 12, "temperature": 0.0, "stop": ["e", "t"], "logprobs": 2},
        {"max_tokens": 12, "temperature": 1.0, "choice": ["yes", "no"]},
    ],
    ids=["greedy", "drawn", "penalties", "schema", "stop", "choice"],
)
def test_the_same_adapter_agrees_with_itself_in_everything(shadowed, options):
    """Drawn tokens too: both answers are drawn with one seed."""
    tokens = 0
    for i, prompt in enumerate(("hello", "once upon a time there was", "x"), 1):
        answer = shadowed.client.generate(prompt, adapter="same", **options)
        tokens += len(answer.token_ids)
        found = shadowed.settled("same", i)
    assert found["compared"] == found["exact"] == found["offered"] == 3
    assert found["answer_tokens"] == found["prefix_tokens"] == tokens
    assert found["scored_tokens"] == found["agreed_tokens"] == tokens
    assert math.isclose(found["incumbent_nll"], found["candidate_nll"], rel_tol=1e-5)


def test_the_incumbent_scores_its_answer_as_it_did_when_it_gave_it(shadowed):
    answer = shadowed.client.generate("hello", adapter="other", logprobs=0, **OPTIONS)
    found = shadowed.settled("other", 1)
    given = -sum(scored.logprob for scored in answer.logprobs)
    assert found["incumbent_nll"] == pytest.approx(given, rel=1e-3)
    assert found["candidate_nll"] > found["incumbent_nll"]


def test_of_several_answers_the_first_is_compared(shadowed):
    found = shadowed.client.generate("hello", n=3, adapter="same", max_tokens=9, temperature=1.5)
    assert len(found.more) == 2
    counts = shadowed.settled("same", 1)
    assert (counts["compared"], counts["exact"]) == (1, 1)
    assert counts["answer_tokens"] == len(found.token_ids)


def test_answers_up_to_the_end_of_the_context_are_scored_but_for_the_last_place(shadowed):
    """The context holds 256 tokens, the last of which is never read."""
    prompt = shadowed.client.tokenize("a " * 300).ids[:200]
    longest = {**OPTIONS, "max_tokens": 1000}
    answer = shadowed.client.generate(prompt, adapter="same", **longest)
    assert len(answer.token_ids) == 56
    counts = shadowed.settled("same", 1)
    assert counts["exact"] == 1 and counts["answer_tokens"] == 56
    assert counts["scored_tokens"] == counts["agreed_tokens"] == 55
    full = shadowed.client.tokenize("a " * 300).ids[:255]
    assert len(shadowed.client.generate(full, adapter="same", **longest).token_ids) == 1
    counts = shadowed.settled("same", 2)
    assert counts["exact"] == 2 and counts["scored_tokens"] == 55


def test_what_is_cancelled_or_fails_is_not_compared(shadowed):
    stream = shadowed.client.stream("hello", adapter="same", **{**OPTIONS, "max_tokens": 200})
    next(iter(stream))
    stream.cancel()
    with pytest.raises(RequestInvalid):
        shadowed.client.generate("hello", adapter="same", max_tokens=4, top_p=3.0)
    shadowed.client.generate("hello", adapter="b@r1", **OPTIONS)
    shadowed.client.generate("hello", adapter="same", **OPTIONS)
    assert shadowed.settled("same", 1)["compared"] == 1


def test_the_declared_share_of_requests_is_chosen_by_their_ids(shadowed):
    half = replace(SAME, shadow=Shadow("x", "y", 30))
    shadowed.host.switch(replace(shadowed.release, release_id="r2", experiments=(half,)))
    ids = [f"request-{i}" for i in range(40)]
    chosen = [i for i in ids if is_compared(half, i)]
    assert 2 < len(chosen) < 30
    for i in ids:
        shadowed.client.generate("x", adapter="same", request_id=i, max_tokens=1, ignore_eos=True)
    shadowed.settled("same", len(chosen))


def test_the_numbers_are_those_of_asking_twice(shadowed):
    client, want = shadowed.client, dict.fromkeys(shadowed.counts("other"), 0.0)
    prompts = ("hello", "once upon a time", "a longer prompt that is read in several pieces")
    for number, prompt in enumerate(prompts, 1):
        answer = client.generate(prompt, adapter="other", **OPTIONS).token_ids
        shadowed.settled("other", number)
        rival = client.generate(prompt, adapter="b", **OPTIONS).token_ids
        common = next((i for i, (p, q) in enumerate(zip(answer, rival, strict=True)) if p != q), 12)
        read = (*client.tokenize(prompt).ids, *answer)
        scores = {
            name: client.generate(
                read, adapter=name, max_tokens=1, ignore_eos=True, prompt_logprobs=1
            ).prompt_logprobs[-len(answer) :]
            for name in ("a@r1", "b@r1")
        }
        a, b = scores.values()
        want["offered"] += 1
        want["compared"] += 1
        want["exact"] += answer == rival
        want["answer_tokens"] += 12
        want["prefix_tokens"] += common
        want["scored_tokens"] += 12
        want["agreed_tokens"] += sum(p.top[0][0] == q.top[0][0] for p, q in zip(a, b, strict=True))
        want["incumbent_nll"] -= sum(p.logprob for p in a)
        want["candidate_nll"] -= sum(q.logprob for q in b)
    assert shadowed.counts("other") == pytest.approx(want, rel=1e-3)
    assert want["prefix_tokens"] < want["answer_tokens"]


def test_nobody_who_asks_notices_and_work_that_comes_ends_a_shadow(shadowed):
    """Four clients, two rows: the answers are those of a quiet device, and so are the counts."""
    client, host = shadowed.client, shadowed.host
    prompts = [f"question {i}" for i in range(6)]
    alone = {p: client.generate(p, adapter="a@r1", **OPTIONS).token_ids for p in prompts}
    before = host.metrics()
    wrong: list[str] = []

    def ask(number: int) -> None:
        with Client(shadowed.address, timeout_s=60) as own:
            for turn in range(8):
                prompt = prompts[(number + turn) % len(prompts)]
                if own.generate(prompt, adapter="other", **OPTIONS).token_ids != alone[prompt]:
                    wrong.append(prompt)
                time.sleep(0.005 * number)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = shadowed.settled("other", 32)
    assert not wrong
    assert found["failed"] == 0
    after = host.metrics()
    assert after["requests"] - before["requests"] == 32
    assert after["tokens"] - before["tokens"] == 32 * 12
    for name in ("adapter_hits", "compositions", "adapter_loads", "use_case_requests.other"):
        asked = 32 if name == "adapter_hits" else 0
        assert after.get(name, 0) - before.get(name, 0) == asked, name
    assert shadowed.leases() == 0 and after["rows_busy"] == 0


def test_a_request_ends_the_shadow_that_runs(shadowed):
    client = shadowed.client
    cancelled = 0.0
    for i in range(40):
        long = {**OPTIONS, "max_tokens": 100}
        first = client.generate(f"a long answer {i}", adapter="other", **long)
        assert len(first.token_ids) == 100
        time.sleep(0.02)  # the shadow has begun with its hundred tokens
        began = client.generate("hi", adapter="a@r1", **{**OPTIONS, "max_tokens": 1})
        assert len(began.token_ids) == 1
        cancelled = shadowed.settled("other", i + 1)["cancelled"]
        if cancelled:
            break
    assert cancelled
    assert shadowed.leases() == 0


def test_nothing_of_prompt_or_answer_is_told(shadowed, caplog):
    caplog.set_level(logging.DEBUG)
    text = shadowed.client.generate("a secret question", adapter="other", **OPTIONS).text
    shadowed.settled("other", 1)
    told = " ".join(str(vars(record)) for record in caplog.records if record.name != "asyncio")
    assert "secret" not in told
    assert text not in told
    names = shadowed.host.metrics()
    assert all(isinstance(value, float) for value in names.values())
    assert not [n for n in names if "secret" in n]


def test_a_switch_and_the_end_do_not_wait_for_shadows(shadowed):
    long = {**OPTIONS, "max_tokens": 150}
    shadowed.client.generate("a long one", adapter="other", **long)
    began = time.monotonic()
    shadowed.host.switch(replace(shadowed.release, release_id="next", experiments=()))
    assert time.monotonic() - began < 5
    assert not [n for n in shadowed.host.metrics() if n.startswith("shadow_")]
    shadowed.client.generate("another", adapter="a", **OPTIONS)
    shadowed.host.drain(5.0)
    with pytest.raises(Unavailable):
        shadowed.client.generate("too late", adapter="a", **OPTIONS)


def test_mixes_are_compared_and_no_use_case_counts_a_shadow(shadowed):
    """Of the use case's two names one is asked for by people, the other by the shadow alone."""
    parts = (WeightedName("a", 0.5), WeightedName("b", 0.25))
    mixed = Experiment(
        "mixed",
        (Arm("x", 100, use_case="one"), Arm("y", 0, use_case="two")),
        shadow=Shadow("x", "y", 100),
    )
    use_cases = tuple(ReleaseUseCase(name, parts) for name in ("one", "two"))
    release = replace(shadowed.release, use_cases=use_cases, experiments=(mixed,))
    shadowed.host.switch(replace(release, release_id="mixes"))
    shadowed.client.generate("hello", adapter="mixed", **OPTIONS)
    found = shadowed.settled("mixed", 1)
    assert (found["compared"], found["exact"], found["agreed_tokens"]) == (1, 1, 12)
    metrics = shadowed.host.metrics()
    assert metrics["compositions"] == 1
    assert not [n for n in metrics if n.startswith("use_case_requests") and n.endswith("two")]


def test_another_engine_ends_the_comparisons_of_the_old_one(shadowed, real_bundles):
    """What they were counted under may be told no more; it is kept."""
    long = {**OPTIONS, "max_tokens": 100}
    for i in range(3):
        shadowed.client.generate(f"a long one {i}", adapter="other", **long)
    int4 = real_bundles.assignment("int4", real_bundles.int4, "r1")
    int4 = replace(int4, experiments=(SAME, OTHER))
    shadowed.host.build(int4, lambda phase, done: None)
    shadowed.client.generate("the last", adapter="other", **long)
    shadowed.host.switch(int4)
    before = shadowed.ended("other", 4)
    shadowed.client.generate("hello", adapter="other", **OPTIONS)
    after = shadowed.ended("other", 5)
    assert after["compared"] == before["compared"] + 1 and not after["failed"]


def test_a_candidate_that_is_not_resident_is_not_brought_in(real_bundles):
    """The bank has room for one: bringing the candidate in would make people's adapter leave."""
    rank = load_adapter(real_bundles.adapter_dir("a")).rank
    with served(real_bundles, RuntimeOptions(bank_rank=rank)) as only:
        only.client.generate("hello", adapter="a@r1", **OPTIONS)
        before = only.host.metrics()
        assert before["adapters_in_bank"] == 1
        only.client.generate("hello", adapter="other", **OPTIONS)
        found = only.settled("other", 1)
        assert (found["offered"], found["skipped"], found["compared"]) == (1, 1, 0)
        after = only.host.metrics()
        assert after["adapter_loads"] == before["adapter_loads"]
        assert after["adapter_evictions"] == before["adapter_evictions"]
