"""Every history of a whole step: requests, adapters that do not fit together, cancellations,
faults, deadlines, memory that runs short and a queue that moves on. Each request ends exactly once
and answers as it would alone; nothing is held in the end."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from remora_agent.bank.bank import Bank, Wanted
from remora_agent.bank.directory import AdapterDirectory
from remora_agent.bank.host import HostCache
from remora_agent.bank.weights import load_weights
from remora_agent.runtime.answer import Answer
from remora_agent.runtime.api import Accepted, Failed, Finished, FinishReason, Provenance, Share
from remora_agent.runtime.jobs import Job, SchedulerLimits
from remora_agent.runtime.memory_floor import MemoryFloor
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.prefix_cache import PrefixCache
from remora_agent.runtime.prefix_keys import BLOCK
from remora_agent.runtime.request import Arrival
from remora_agent.runtime.sampling import Sampler
from remora_agent.runtime.scheduler import Scheduler
from remora_agent.runtime.speculation import Speculation
from remora_agent.runtime.stepper import Stepper
from remora_contract.errors import DeadlineExceeded, EngineFault, Exhausted
from tests.support.overlap_engine import OverlapEngine
from tests.support.reference_engine import HIDDEN, ReferenceEngine, fault
from tests.support.runtime import VOCAB, add_adapter, byte_text, make_bundle, request

ROWS, CONTEXT, RANK = 2, 128, 4
LIMITS = SchedulerLimits(ROWS, 6, 500, 16, aging_s=4.0, inter_token_s=0.5, spare_after_s=0.02)
TOKEN_BYTES = 8 * HIDDEN


@functools.cache
def world():
    """Two adapters of which the bank holds one."""
    bundle = make_bundle(CONTEXT, RANK)
    directory = AdapterDirectory(bundle)
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate("ab"):
            add_adapter(directory, bundle, Path(folder) / name, name, "r1", seed=i, r=RANK)
        records = {name: directory.resolve(name, None) for name in "ab"}
        weights = {r.digest: load_weights(r.directory, bundle) for r in records.values()}
    return records, weights


class Slow:
    """Reads that end when the history says so."""

    def __init__(self):
        self.in_flight = []

    def start(self, adapter):
        if adapter.digest not in self.in_flight:
            self.in_flight.append(adapter.digest)
        return True

    def finished(self, digest):
        self.in_flight.remove(digest)

    def freed(self):
        """Nobody waits for host memory here."""


class Steps(RuleBasedStateMachine):
    make_engine = ReferenceEngine
    switch: int | None = None

    def __init__(self):
        super().__init__()
        self.now, self.free, self.count = 0.0, 1 << 40, 0
        self.records, self.weights = world()
        self.engine = self.make_engine(ROWS, CONTEXT, VOCAB, RANK, switch=self.switch)
        self.loader = Slow()
        self.bank = Bank(self.engine, HostCache(1 << 30), self.loader, self.clock)
        memory = MemoryFloor(lambda: self.free, 1000, ROWS, TOKEN_BYTES, self.clock)
        self.prefixes = PrefixCache(self.engine, 6 * BLOCK * TOKEN_BYTES, lambda: memory.low)
        self.scheduler = Scheduler(LIMITS)
        self.stepper = Stepper(
            self.engine,
            self.bank,
            self.scheduler,
            RuntimeMetrics(),
            self.clock,
            self.prefixes,
            memory,
            Speculation(4),
        )
        self.sent, self.heard, self.moved, self.cancelled = {}, {}, set(), set()

    def clock(self):
        return self.now

    @rule(
        blocks=st.integers(0, 2),
        extra=st.integers(1, 20),
        count=st.integers(1, 6),
        adapter=st.sampled_from(["", "a", "b"]),
        deadline=st.none() | st.floats(0.1, 20),
        priority=st.integers(-1, 1),
        client=st.sampled_from("xy"),
    )
    def submit(self, blocks, extra, count, adapter, deadline, priority, client):
        name = f"r{self.count}"
        self.count += 1
        prompt = (*range(blocks * BLOCK), *range(200, 200 + extra))
        mix = {adapter: 1.0} if adapter else {}
        until = None if deadline is None else self.now + deadline
        made = replace(request(name, prompt, count, mix, deadline_s=until), share=Share(priority))
        wanted = tuple(Wanted(self.records[n], w) for n, w in mix.items())
        events = []
        answer = Answer(
            made,
            Provenance("b", "e"),
            Sampler(made.sampling, 1),
            byte_text().detokenizer(prompt),
            frozenset(),
            events.append,
            self.now,
        )
        job = Job(name, len(prompt), until, (), count, priority, client)
        try:
            self.stepper.add(Arrival(answer, wanted, job))
        except Exhausted as e:
            assert e.retry_after_s > 0 and not events
            return
        self.sent[name], self.heard[name] = made, events

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            self.now += 0.01
            self.stepper.step()

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def load(self):
        for digest in list(self.loader.in_flight):
            self.bank.loaded(digest, self.weights[digest])

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.sent)))
        found = self.stepper.cancel(name)
        assert found == (self.end_of(name) is None and name not in self.moved)
        if found:
            self.cancelled.add(name)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def withdraw(self, data):
        among = data.draw(st.sets(st.sampled_from(sorted(self.sent))))
        gone = self.stepper.withdraw(among)
        assert set(gone) <= among and not set(gone) & self.moved
        assert all(self.end_of(name) is None for name in gone)
        self.moved |= set(gone)

    @rule()
    def break_a_step(self):
        self.engine.faults.append(fault())

    @rule(free=st.sampled_from([0, 1000 + 40 * TOKEN_BYTES, 1 << 40]))
    def change_memory(self, free):
        self.free = free

    def end_of(self, name):
        ends = [e for e in self.heard[name] if isinstance(e, Finished | Failed)]
        assert len(ends) <= 1
        return ends[0] if ends else None

    @invariant()
    def each_is_somewhere_once(self):
        here = {n for n in self.sent if self.end_of(n) is None and n not in self.moved}
        waiting = set(self.scheduler.waiting())
        running = {job.request_id for _, job in self.scheduler.running()}
        assert waiting | running == here and not waiting & running
        rows = [row for row, _ in self.scheduler.running()]
        assert sorted([*rows, *self.scheduler.free_rows]) == list(range(ROWS))
        adapted = sum(bool(self.sent[n].adapters) for n in running)
        assert sum(p.leases for p in self.bank.snapshot.places) == adapted

    @invariant()
    def events_are_in_order(self):
        for name, events in self.heard.items():
            kinds = [type(e) for e in events]
            assert Accepted not in kinds[1:]
            if name in self.moved:
                assert kinds in ([], [Accepted])
            elif kinds and kinds[0] is not Accepted:
                raise AssertionError(kinds)
            if self.end_of(name) is not None:
                assert isinstance(events[-1], Finished | Failed)

    def teardown(self):
        """Left alone, with memory and files there, all that is left ends."""
        self.free = 1 << 40
        self.engine.faults.clear()
        for _ in range(3000):
            if self.scheduler.empty:
                break
            self.load()
            self.now += 0.05
            self.stepper.step()
        for name, made in self.sent.items():
            if name not in self.moved:
                self.check(name, made)
        assert self.scheduler.empty and self.bank.snapshot.leases == 0
        assert sorted(self.scheduler.free_rows) == list(range(ROWS))

    def check(self, name, made):
        end = self.end_of(name)
        tokens = tuple(t for e in self.heard[name] for t in getattr(e, "token_ids", ()))
        mix = {self.records[a.name].digest: a.weight for a in made.adapters}
        alone = self.engine.solo(made.prompt, made.stopping.max_tokens, mix)
        assert alone[: len(tokens)] == tokens
        if isinstance(end, Finished):
            assert end.usage.cached_tokens < len(made.prompt)
            if end.reason is FinishReason.CANCELLED:
                assert name in self.cancelled
            else:
                assert tokens == alone
        else:
            assert isinstance(end, Failed)
            assert isinstance(end.error, DeadlineExceeded | EngineFault | Exhausted)


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class StepsBeside(Steps):
    """The same where prompts are read beside decode steps."""

    make_engine = OverlapEngine

    @rule()
    def refuse_to_begin(self):
        self.engine.refuse_begin.append(fault())


TestStepsBeside = StepsBeside.TestCase
TestStepsBeside.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


class SwitchingSteps(Steps):
    """The same on a model that turns longer sequences otherwise: rows are read again between all
    the rest."""

    switch = BLOCK + 10


TestSwitchingSteps = SwitchingSteps.TestCase
TestSwitchingSteps.settings = TestSteps.settings


class SwitchingBeside(StepsBeside):
    """Both at once."""

    switch = BLOCK + 10


TestSwitchingBeside = SwitchingBeside.TestCase
TestSwitchingBeside.settings = TestSteps.settings
