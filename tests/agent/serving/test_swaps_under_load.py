"""Adapters and engines change under three kinds of clients: nobody fails, nothing is mixed."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from contextlib import contextmanager

import numpy as np
import openai
import pytest
import tritonclient.grpc as triton

from remora_agent.client import Client
from remora_agent.serving.address import TcpAddress
from remora_agent.serving.openai.settings import OpenAiOptions
from remora_contract.errors import RemoraError
from tests.support.serving import ReferenceEngines, World, running_stack

COUNT = 12
REVISIONS = ("r1", "r2")
KINDS = ("grpc", "kserve", "http", "use case")
USE_CASES = {"half": {"a": 0.5}}  # of whichever revision a request meets
REFUSALS = (RemoraError, triton.InferenceServerException, openai.OpenAIError)


class Load:
    """Callers that ask the same thing until told to stop. `allowed(prompt)` are the texts that the
    one or the other revision gives alone; `wrong` is what else was heard."""

    def __init__(self, allowed) -> None:
        self.allowed = allowed
        self.wrong: list[str] = []
        self.answers: Counter[str] = Counter()
        self.revisions: Counter[int] = Counter()
        self.stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, kind, ask) -> None:
        thread = threading.Thread(target=self._run, args=(kind, ask), name=f"load-{kind}")
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), thread.name

    def _run(self, kind, ask) -> None:
        for i in itertools.count():
            if self.stop.is_set():
                return
            prompt = f"{kind} {i % 7}"
            try:
                text = ask(prompt)
            except REFUSALS as e:
                self.wrong.append(f"{kind}: {type(e).__name__}: {e}")
                return
            self.answers[kind] += 1
            if text in self.allowed(prompt):
                self.revisions[self.allowed(prompt).index(text)] += 1
            else:
                self.wrong.append(f"{kind}: {prompt!r} was answered with {text!r}")


def tensor(name: str, value: object, kind: str) -> triton.InferInput:
    made = triton.InferInput(name, [1], kind)
    made.set_data_from_numpy(np.array([value], np.object_ if kind == "BYTES" else np.int32))
    return made


@contextmanager
def callers(load: Load, address: str, http: str, each: int):
    with (
        Client(address, timeout_s=60) as own,
        triton.InferenceServerClient(address) as kserve,
        openai.OpenAI(base_url=f"{http}/v1", api_key="none", max_retries=0, timeout=60) as web,
    ):

        def over_kserve(prompt: str) -> str:
            inputs = [
                tensor("text_input", prompt.encode(), "BYTES"),
                tensor("max_tokens", COUNT, "INT32"),
            ]
            result = kserve.infer("ensemble", inputs, parameters={"adapter": "a"})
            return result.as_numpy("text_output").reshape(-1)[0].decode()

        def over_http(prompt: str) -> str:
            pieces = web.completions.create(
                model="a", prompt=prompt, max_tokens=COUNT, temperature=0, stream=True
            )
            return "".join(piece.choices[0].text for piece in pieces if piece.choices)

        def over_grpc(prompt: str) -> str:
            return own.generate(prompt, adapter="a", max_tokens=COUNT).text

        def by_use_case(prompt: str) -> str:
            return own.generate(prompt, use_case="half", max_tokens=COUNT).text

        for _ in range(each):
            load.add("grpc", over_grpc)
            load.add("use case", by_use_case)
            load.add("kserve", over_kserve)
            load.add("http", over_http)
        try:
            yield
        finally:
            load.join()


def under_load(tmp_path, adapter_swaps: int, engine_swaps: int, each: int) -> Load:
    world, engines = World(tmp_path), ReferenceEngines()
    options = {"openai": OpenAiOptions(TcpAddress("127.0.0.1", 0))}
    with running_stack(tmp_path, engines, **options) as (stack, address):
        stack.host.switch(world.assignment(adapters=[("a", "r1")], use_cases=USE_CASES))
        engine = engines.opened[0]
        with Client(address) as client:

            def solo(prompt: str, revision: str) -> str:
                weight = USE_CASES["half"]["a"] if prompt.startswith("use case") else 1.0
                mix = {world.adapter("a", revision).digest: weight}
                tokens = engine.solo(client.tokenize(prompt).ids, COUNT, mix)
                ends = world.bundle("base").eos_token_ids
                return client.detokenize(list(itertools.takewhile(lambda t: t not in ends, tokens)))

            kinds = [f"{kind} {i}" for kind in KINDS for i in range(7)]
            texts = {p: tuple(solo(p, r) for r in REVISIONS) for p in kinds}
        load = Load(texts.__getitem__)
        with callers(load, address, f"http://{stack.openai_address.target()}", each):
            every = max(1, adapter_swaps // engine_swaps)
            for swap in range(adapter_swaps):
                bundle = ("base", "next")[swap // every % 2]
                engines.fits = bool(swap // every % 4 < 2)  # beside the old one, or instead of it
                release = world.assignment(
                    f"release-{swap}", bundle, [("a", REVISIONS[swap % 2])], USE_CASES
                )
                stack.host.switch(release)
                before = load.answers.total()
                while load.answers.total() < before + each and not load.wrong:
                    load.stop.wait(0.005)
        metrics = stack.host.metrics()
        assert metrics["failures"] == 0
        assert metrics["rows_busy"] == metrics["queue_depth"] == metrics["adapter_leases"] == 0
        assert len(engines.opened) == engine_swaps
    return load


def check(load: Load) -> None:
    assert not load.wrong, load.wrong[:3]
    assert set(load.answers) == set(KINDS)
    assert set(load.revisions) == {0, 1}  # both revisions have answered


def test_ten_adapter_swaps_and_two_engine_swaps_fail_no_request(tmp_path):
    check(under_load(tmp_path, 10, 2, each=1))


@pytest.mark.slow
def test_a_hundred_adapter_swaps_and_five_engine_swaps_fail_no_request(tmp_path):
    load = under_load(tmp_path, 100, 5, each=4)
    check(load)
    assert load.answers.total() >= 400
