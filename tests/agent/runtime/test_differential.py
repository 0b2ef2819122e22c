"""Random requests through the full runtime answer as through a plain one.

The plain one has one row and neither prefix cache nor drafts; the full one has all of that, small
banks, few rows, and other callers who cancel, embed and unload meanwhile.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from remora_agent.runtime.api import (
    Accepted,
    AdapterRef,
    Constraint,
    ConstraintKind,
    Delta,
    Failed,
    Finished,
    GenerationRequest,
    PromptScored,
    SamplingParams,
    Scoring,
    Share,
    StoppingParams,
    TokenLogprob,
)
from remora_agent.runtime.embedding import EmbeddingRequest
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.errors import RemoraError
from tests.support.runtime import EOS, Listener

REQUESTS = 40
RANKS = {"a": 4, "b": 4, "c": 4, "d": 8}
INVOCATIONS = {"c": (9, 9), "d": (7, 8)}
CONSTRAINTS = (
    *(None,) * 5,
    Constraint(ConstraintKind.REGEX, "[a-f]{3,20}( [0-9]{2})*"),
    Constraint(ConstraintKind.JSON_OBJECT),
    Constraint(ConstraintKind.CHOICE, options=("yes yes", "no", "yes maybe é")),
)
BIASES = ((), (), ((EOS, 6.0),), ((97, 9.0), (98, 9.0)), ((255, 50.0),))
PLAIN = RuntimeOptions(prefix_bytes=0, draft_tokens=0, memory_floor_bytes=0)
Bases = Sequence[tuple[int, ...]]


def prompt_bases(draw: random.Random) -> Bases:
    """What prompts begin with: they share prefixes within blocks and at their borders."""
    return [tuple(draw.randrange(256) for _ in range(n)) for n in (40, 70, 100)]


def prompt(draw: random.Random, bases: Bases) -> tuple[int, ...]:
    made = draw.choice(bases)[: draw.choice([1, 2, 31, 32, 33, 64, 65, 96, 100])]
    if draw.random() < 0.5:
        made += tuple(draw.randrange(256) for _ in range(draw.choice([1, 5, 33])))
    if draw.random() < 0.4:
        made += draw.choice([(9, 9), (7, 8), (9, 9, 1), (7, 8, 2, 3)])  # invokes c or d
    if draw.random() < 0.2:
        made = (made[:10] * 12)[:110]  # repeats itself: drafts are right
    return made[:158]


def sampling(draw: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=draw.choice([0, 0, 0, 0.7, 1.5]),
        top_k=draw.choice([0, 5]),
        top_p=draw.choice([1, 0.9]),
        min_p=draw.choice([0, 0.05]),
        repetition_penalty=draw.choice([1, 1, 1.3]),
        presence_penalty=draw.choice([0, 0, 0.5]),
        frequency_penalty=draw.choice([0, 0, 0.4]),
        seed=draw.randrange(1000),
        logit_bias=draw.choice(BIASES),
    )


def request(draw: random.Random, request_id: str, bases: Bases) -> GenerationRequest:
    constraint = draw.choice(CONSTRAINTS)
    adapters = draw.sample(list(RANKS), draw.choice([0, 0, 0, 1, 1, 2]))
    most = draw.choice([1, 2, 8, 40, 200])
    stopping = StoppingParams(
        most,
        stop=draw.choice([(), (), ("a",), ("ab", "b"), ("é",)]),
        stop_token_ids=draw.choice([(), (), (99,)]),
        ignore_eos=draw.random() < 0.5 and constraint is None,
        min_tokens=min(draw.choice([0, 0, 0, 1, 5]), most),
    )
    return GenerationRequest(
        request_id,
        prompt(draw, bases),
        tuple(AdapterRef(n, None, draw.choice([1.0, 0.5, -1.0, 0.0])) for n in adapters),
        sampling(draw),
        stopping,
        None,
        constraint,
        Scoring(draw.choice([None, None, 0, 3]), draw.choice([None, None, None, 0, 2])),
        Share(draw.randrange(-3, 3), draw.choice(["", "x", "y"]), draw.choice(["", "", "salt"])),
    )


def answers(runtime: Any, requests: Sequence[GenerationRequest], *, together: bool) -> list[Any]:
    listeners = []
    for asked in requests:
        listener = Listener()
        listeners.append(listener)
        try:
            grammar = runtime.compile(asked.constraint).result(20) if asked.constraint else None
            runtime.submit(asked, listener, grammar)
        except RemoraError as e:
            listener(Accepted(asked.request_id, None))
            listener(Failed(e))
        if not together:
            listener.wait(30)
    for listener in listeners:
        listener.wait(60)
    return [told(listener) for listener in listeners]


def told(listener: Listener) -> tuple[Any, ...]:
    """All that may not depend on who else is there."""
    events = listener.events
    assert sum(isinstance(e, Accepted) for e in events) == 1
    assert ends(listener) == 1
    last = events[-1]
    if isinstance(last, Finished):
        end = (last.reason, last.stop_match, last.usage.completion_tokens)
    else:
        end = (type(last.error).__name__, str(last.error)[:60])
    answer = [scored(t) for e in events if isinstance(e, Delta) for t in e.logprobs]
    prompts = [[scored(t) for t in e.logprobs] for e in events if isinstance(e, PromptScored)]
    return listener.tokens, listener.text, end, answer, prompts


def ends(listener: Listener) -> int:
    return sum(isinstance(e, Finished | Failed) for e in listener.events)


def scored(token: TokenLogprob) -> tuple[Any, ...]:
    top = tuple((i, round(p, 3)) for i, p in token.top)
    return token.token_id, round(token.logprob, 3), top


class Neighbours:
    """Others on the same runtime, until they are stopped: they cancel, embed and unload."""

    def __init__(self, runtime: Any, seed: int, bases: Bases) -> None:
        self._runtime, self._draw, self._bases = runtime, random.Random(seed), bases
        self.wrong: list[str] = []

    @contextmanager
    def around(self) -> Any:
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(60)

    def _run(self, stop: threading.Event) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            act = self._draw.choice([self._cancel, self._embed, self._unload])
            with suppress(RemoraError):  # refusals are as good as answers here
                act(count)

    def _cancel(self, count: int) -> None:
        made = replace(request(self._draw, f"cancelled-{count}", self._bases), constraint=None)
        listener = Listener()
        self._runtime.submit(made, listener)
        threading.Event().wait(self._draw.random() * 0.005)
        self._runtime.cancel(made.request_id)
        listener.wait(30)
        if ends(listener) != 1:
            self.wrong.append(f"{made.request_id} has {ends(listener)} ends")

    def _embed(self, count: int) -> None:
        ended, heard = threading.Event(), []

        def hear(event: object) -> None:
            heard.append(event)
            ended.set()

        length = self._draw.choice([1, 33, 70])
        adapters = self._draw.sample(list(RANKS), self._draw.choice([0, 1]))
        asked = EmbeddingRequest(
            f"embedded-{count}",
            tuple(base[:length] for base in self._bases) * 2,
            tuple(AdapterRef(name) for name in adapters),
        )
        cancel: Callable[[], object] = self._runtime.embed(asked, hear)
        if self._draw.random() < 0.3:
            cancel()
        if not ended.wait(30) or len(heard) != 1:
            self.wrong.append(f"{asked.request_id} has {len(heard)} ends")

    def _unload(self, count: int) -> None:
        self._runtime.adapters.unload(self._draw.choice(list(RANKS)))


def full_options(draw: random.Random) -> RuntimeOptions:
    return RuntimeOptions(
        prefill_chunk=draw.choice([7, 32, 64, 256]),
        prefix_bytes=draw.choice([1, 4000, 1 << 20]),
        draft_tokens=draw.choice([1, 8, 16]),
        exact_drafts=draw.random() < 0.3,
        patience_s=0.05,
        memory_floor_bytes=0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_answers_do_not_depend_on_how_the_runtime_makes_them(serve, seed):
    draw = random.Random(seed)
    bases = prompt_bases(draw)
    asked = [request(draw, f"r{i}", bases) for i in range(REQUESTS)]
    shape = {"context": 160, "invocations": INVOCATIONS}
    plain = serve(RANKS, rows=1, max_bank_rank=20, options=PLAIN, **shape).runtime
    full = serve(
        RANKS,
        rows=draw.choice([1, 2, 3]),
        max_bank_rank=draw.choice([12, 20]),
        copies_kv=draw.random() < 0.8,
        options=full_options(draw),
        **shape,
    ).runtime
    if full.options.exact_drafts:
        full.probe()
    expected = answers(plain, asked, together=False)
    neighbours = Neighbours(full, seed + 1, bases)
    with neighbours.around():
        for turn in range(2):
            again = [replace(r, request_id=f"{r.request_id}-{turn}") for r in asked]
            for one, found, wanted in zip(
                asked, answers(full, again, together=True), expected, strict=True
            ):
                assert found == wanted, one
    assert not neighbours.wrong
    assert full.drain(10)
    metrics = full.metrics()
    assert metrics["rows_busy"] == metrics["queue_depth"] == 0
    assert all(adapter.leases == 0 for adapter in full.adapters.list())
