"""Everything at once, step by step: people's requests with several answers, sampled, constrained,
scored and cancelled, embeddings, an experiment with a shadow, adapters that come, go, move and
cannot be read, queues that move, memory that runs short, prompts read beside steps, rows that are
read again, drafts, faults. Each answer is the one that a plain runtime gives to that request alone,
each request ends once, and nothing is held in the end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remora_agent.bank.directory import AdapterDirectory, Declared
from remora_agent.runtime.adapters import UnloadMode
from remora_agent.runtime.api import (
    AdapterRef,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    SamplingOverrides,
    StoppingOverrides,
)
from remora_agent.runtime.embedding import Embedded, EmbeddingRequest, Pooling
from remora_agent.serving.call import GenerateCall, TokenPrompt
from remora_agent.serving.choices import choice_call, choice_ids
from remora_agent.serving.experiment_counts import ExperimentCounts
from remora_agent.serving.served_model import ServedModel
from remora_contract.errors import (
    ArtifactInvalid,
    DeadlineExceeded,
    EngineFault,
    Exhausted,
    RemoraError,
)
from remora_contract.experiments import SHADOW_COUNTS, Arm, Experiment, Shadow
from tests.agent.runtime.manual import manual_runtime
from tests.agent.runtime.test_differential import (
    INVOCATIONS,
    PLAIN,
    RANKS,
    ends,
    full_options,
    prompt_bases,
    request,
    told,
)
from tests.support.overlap_engine import OverlapEngine
from tests.support.reference_engine import HIDDEN, ReferenceEngine, fault
from tests.support.runtime import VOCAB, Listener, add_adapter, make_bundle

CONTEXT, STEPS = 160, 70
FLOOR = 1000
ENOUGH = 1 << 40
ENDS = ("compared", "skipped", "cancelled", "failed")


@dataclass
class Asked:
    request: GenerationRequest
    heard: Listener
    has_deadline: bool
    is_cancelled: bool = False


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Plain:
    """One row, no prefixes, no drafts, nobody else."""

    def __init__(self, runtime: Any, loop: Any, reads: Any) -> None:
        self.runtime, self._loop, self._reads = runtime, loop, reads

    def answer(self, asked: GenerationRequest) -> Listener:
        listener = Listener()
        grammar = asked.constraint and self.runtime.compile(asked.constraint).result(20)
        self.runtime.submit(asked, listener, grammar)
        self._run(lambda: ends(listener))
        return listener

    def vectors(self, asked: EmbeddingRequest) -> np.ndarray:
        heard: list[Any] = []
        self.runtime.embed(asked, heard.append)
        self._run(lambda: heard)
        return heard[0].vectors

    def _run(self, done: Any) -> None:
        for _ in range(5000):
            if done():
                return
            if self._reads.in_flight:
                self._reads.finish()
            self._loop.step()
        raise AssertionError("no end")


class History:
    """What happens to a model, drawn from `draw`."""

    def __init__(self, draw: random.Random, clock: Clock, engine: ReferenceEngine, parts: Any):
        self.draw, self.clock, self.engine = draw, clock, engine
        self.runtime, self.loop, self.reads = parts
        self.stepper = self.runtime._stepper
        self.scheduler = self.stepper._scheduler
        self.directory = self.runtime.adapters.directory
        self.counts, self.declared = ExperimentCounts(), list[Declared]()
        self.model = ServedModel(self.runtime, experiments=self.counts)
        self.bases = prompt_bases(draw)
        self.asked: dict[str, Asked] = {}
        self.embedded: list[tuple[EmbeddingRequest, list[Any], Any]] = []
        self.free, self.count, self.are_files_whole = ENOUGH, 0, False

    def play(self) -> None:
        rare = [self.embed, self.end_embedding, self.unload, self.move_a_name, self.preload]
        rare += [self.declare, self.refuse_to_begin, self.break_a_step, self.move_the_queue]
        acts = [self.submit] * 6 + [self.step] * 12 + [self.cancel] * 2 + [self.read] * 4 + rare
        for _ in range(STEPS):
            self.draw.choice([*acts, self.change_memory])()
            self.check()

    # -- acts -----------------------------------------------------------------------------------

    def submit(self) -> None:
        draw, self.count = self.draw, self.count + 1
        made = request(draw, f"r{self.count}", self.bases)
        if draw.random() < 0.7:
            made = replace(made, constraint=None)
        if self.asked and draw.random() < 0.4:
            made = self.next_turn(made)
        refs = [replace(a, revision=draw.choice([None, "r1", "r2"])) for a in made.adapters]
        in_experiment = self.directory.experiments() and draw.random() < 0.4
        call = GenerateCall(
            TokenPrompt(made.prompt),
            (AdapterRef("x"),) if in_experiment else tuple(refs),
            SamplingOverrides(**vars(made.sampling)),
            StoppingOverrides(**vars(made.stopping)),
            made.request_id,
            made.constraint,
            made.scoring,
            draw.choice([1, 1, 1, 2, 3]),
            share=made.share,
            session=draw.choice(["", "one", "two"]),
        )
        timeout_s = draw.choice([None, None, None, 0.2, 2.0])
        ids = choice_ids(made.request_id, call.n)
        heard = [Listener() for _ in ids]
        grammar = self.model.grammar(call)
        try:
            self.model.submit_choices(ids, call, made.prompt, timeout_s, heard, grammar)
        except RemoraError:
            assert not any(listener.events for listener in heard)
            return
        for i, (name, listener) in enumerate(zip(ids, heard, strict=True)):
            one = choice_call(call, i)
            sampling = replace(made.sampling, seed=one.sampling.seed)
            own = replace(made, request_id=name, sampling=sampling, scoring=one.scoring)
            self.asked[name] = Asked(own, listener, timeout_s is not None)

    def next_turn(self, made: GenerationRequest) -> GenerationRequest:
        """After what somebody has said and heard, through his adapters or others."""
        before = self.asked[self.draw.choice(list(self.asked))]
        text = (*before.request.prompt, *before.heard.tokens, self.draw.randrange(256))
        weights = self.draw.choice([[1.0], [1.0], [0.5, 1.0]])
        same = [replace(a, weight=self.draw.choice(weights)) for a in before.request.adapters]
        adapters = tuple(same) if self.draw.random() < 0.7 else made.adapters
        return replace(made, prompt=text[: CONTEXT - 2], adapters=adapters)

    def step(self) -> None:
        for _ in range(self.draw.choice([1, 1, 2, 5, 20])):
            self.clock.now += self.draw.choice([0.001, 0.01, 0.05])
            self.loop.step()
            self.check()

    def cancel(self) -> None:
        name = self.draw.choice([*self.asked, ""])
        if self.runtime.cancel(name):
            self.asked[name].is_cancelled = True

    def read(self) -> None:
        if self.reads.in_flight:
            self.reads.finish(broken=not self.are_files_whole and self.draw.random() < 0.1)

    def embed(self) -> None:
        draw, self.count = self.draw, self.count + 1
        cut = draw.choice([1, 33, 70])
        made = EmbeddingRequest(
            f"e{self.count}",
            tuple(base[:cut] for base in self.bases) * draw.choice([1, 2]),
            tuple(AdapterRef(n, "r1") for n in draw.sample(list(RANKS), draw.choice([0, 1]))),
            draw.choice(list(Pooling)),
            deadline_s=draw.choice([None, None, self.clock.now + 0.5]),
        )
        heard: list[Any] = []
        with suppress(RemoraError):
            self.embedded.append((made, heard, self.runtime.embed(made, heard.append)))

    def end_embedding(self) -> None:
        if self.embedded:
            self.draw.choice(self.embedded)[-1]()

    def unload(self) -> None:
        mode = self.draw.choice(list(UnloadMode))
        record = self.directory.resolve(self.adapter(), self.revision())
        if mode is UnloadMode.CANCEL:
            for r in self.stepper._requests.values():
                if r.uses(record.digest) and r.id in self.asked:
                    self.asked[r.id].is_cancelled = True
        with suppress(RemoraError):
            self.runtime.adapters.unload(record.name, record.revision, mode)

    def move_a_name(self) -> None:
        with self.model.changing_names():
            self.directory.set_alias(self.adapter(), self.revision())

    def preload(self) -> None:
        with suppress(RemoraError):
            record = self.directory.resolve(self.adapter(), self.revision())
            self.runtime._bank.preload(record, Future())

    def declare(self) -> None:
        arms, percent = {"i": self.adapter(), "c": self.adapter()}, self.draw.choice([60, 100])
        parts = (Arm("i", percent, adapter=arms["i"]), Arm("c", 100 - percent, adapter=arms["c"]))
        made = Experiment("x", parts, shadow=Shadow("i", "c", 100.0))
        identities = {arm: f"{len(self.declared)}{arm}" for arm in arms}
        runs = {arm: ((self.directory.resolve(n).digest, 1.0),) for arm, n in arms.items()}
        self.declared.append(Declared(made, identities, runs))
        with self.model.changing_names():
            self.directory.set_experiments(self.declared[-1:])

    def refuse_to_begin(self) -> None:
        if isinstance(self.engine, OverlapEngine):
            self.engine.refuse_begin.append(fault())

    def break_a_step(self) -> None:
        self.engine.faults.append(fault())

    def move_the_queue(self) -> None:
        """As a switch that does not succeed: it comes back, but who is cancelled meanwhile."""
        held = self.model.give_up_waiting()
        gone = self.draw.choice([*held._held, ""])
        if self.runtime.cancel(gone):
            self.asked[gone].is_cancelled = True
        held.hand_back(self.model, self.clock.now)

    def change_memory(self) -> None:
        self.free = self.draw.choice([0, FLOOR + 50 * 8 * HIDDEN, ENOUGH, ENOUGH])

    def adapter(self) -> str:
        return self.draw.choice(list(RANKS))

    def revision(self) -> str:
        return self.draw.choice(["r1", "r2"])

    # -- checks ---------------------------------------------------------------------------------

    def check(self) -> None:
        running, requests = self.scheduler._running, self.stepper._requests
        rows = [r.row for r in running.values()]
        assert sorted([*rows, *self.scheduler.free_rows]) == list(range(self.engine.limits.rows))
        assert {*running, *self.scheduler.waiting()} == requests.keys()
        assert self.scheduler._cancelled <= requests.keys()
        leased = sum(r.lease is not None for r in requests.values())
        assert self.runtime._bank.snapshot.leases == leased

    def end(self) -> None:
        """Left alone, all ends; nothing is held."""
        self.engine.faults.clear()
        self.free, self.are_files_whole = ENOUGH, True
        for _ in range(20000):
            self.read()
            self.clock.now += 0.01
            is_idle = self.loop.step() is not None and not self.reads.in_flight
            self.check()
            if is_idle and self.scheduler.idle and not self.is_shadowing():
                break
        assert self.scheduler.idle and not self.is_shadowing()
        assert not self.model._waiting._calls and not self.scheduler._share._within
        metrics = self.runtime.metrics()
        assert metrics["rows_busy"] == metrics["queue_depth"] == 0
        self.check_shadows()

    def is_shadowing(self) -> bool:
        shadow = self.model._shadow
        return bool(shadow._waiting or shadow._running)

    def check_shadows(self) -> None:
        found = {}
        for one in self.declared:
            found |= self.counts.metrics([one])
        sums = {
            name: sum(v for n, v in found.items() if n.startswith(f"shadow_{name}."))
            for name in SHADOW_COUNTS
        }
        assert sums["offered"] == sum(sums[end] for end in ENDS)

    def check_answers(self, plain: Plain) -> None:
        for name, one in self.asked.items():
            have = told(one.heard)
            end = one.heard.events[-1]
            if isinstance(end, Failed) and self.may_fail(one, end.error):
                continue
            if isinstance(end, Finished):
                adapters, reason = end.provenance.adapters, end.reason
            else:
                adapters, reason = one.heard.events[0].provenance.adapters, None
            ran = tuple(AdapterRef(a.name, a.revision, a.weight) for a in adapters)
            want = told(plain.answer(replace(one.request, adapters=ran)))
            if reason is FinishReason.CANCELLED:
                assert one.is_cancelled, name
                assert want[0][: len(have[0])] == have[0], one.request
            else:
                assert want == have, one.request

    def may_fail(self, one: Asked, error: RemoraError) -> bool:
        expected = (ArtifactInvalid, EngineFault, Exhausted)
        return isinstance(error, expected) or (
            one.has_deadline and isinstance(error, DeadlineExceeded)
        )

    def check_vectors(self, plain: Plain) -> None:
        for asked, heard, _ in self.embedded:
            assert len(heard) == 1, asked.request_id
            if isinstance(heard[0], Embedded):
                alone = plain.vectors(replace(asked, deadline_s=None))
                assert np.allclose(alone, heard[0].vectors, atol=1e-6)


def adapters_of(bundle: Any, folder: Path) -> AdapterDirectory:
    """Two revisions of each."""
    directory = AdapterDirectory(bundle)
    for i, (name, rank) in enumerate(RANKS.items()):
        for j, revision in enumerate(("r1", "r2")):
            path, words = folder / f"{name}-{revision}", INVOCATIONS.get(name, ())
            more = {"seed": i + 10 * j, "r": rank, "invocation_tokens": words}
            add_adapter(directory, bundle, path, name, revision, **more)
    return directory


@contextmanager
def plain_model(folder: Path, clock: Clock, switch: int | None) -> Iterator[Plain]:
    bundle = make_bundle(CONTEXT, 20)
    engine = ReferenceEngine(1, CONTEXT, VOCAB, 20, switch=switch)
    directory = adapters_of(bundle, folder)
    with manual_runtime(engine, bundle, directory, options=PLAIN, clock=clock) as parts:
        yield Plain(*parts)


def run(seed: int, folder: Path) -> None:
    draw, clock = random.Random(seed), Clock()
    switch, rank = draw.choice([None, 40, 64, 70, 100]), draw.choice([8, 12, 20])
    kind = draw.choice([ReferenceEngine, OverlapEngine, OverlapEngine])
    copies = draw.random() < 0.8
    engine = kind(draw.choice([1, 2, 3, 4]), CONTEXT, VOCAB, rank, copies_kv=copies, switch=switch)
    options = replace(
        full_options(draw),
        spare_after_s=draw.choice([0.0, 0.02]),
        memory_floor_bytes=FLOOR,
    )
    bundle = make_bundle(CONTEXT, rank)
    directory = adapters_of(bundle, folder / "full")
    more = {"options": options, "clock": clock, "free_bytes": lambda: history.free}
    with manual_runtime(engine, bundle, directory, **more) as parts:
        history = History(draw, clock, engine, parts)
        if options.exact_drafts:
            history.runtime.probe()
        history.play()
        history.end()
    assert engine.closed and not engine._adapters
    with plain_model(folder / "plain", clock, switch) as plain:
        history.check_answers(plain)
        history.check_vectors(plain)


@pytest.mark.parametrize("seed", range(8))
def test_answers_are_those_of_a_request_alone_and_nothing_is_held(seed, tmp_path):
    run(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 200))
def test_so_it_is_in_many_histories(seed, tmp_path):
    run(seed, tmp_path)
