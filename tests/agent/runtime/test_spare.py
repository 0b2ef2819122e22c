"""Work that nobody waits for: every history of a step again, with such work in between. Everybody
else hears what he hears without it, it computes in no step of theirs, and holds nothing in the
end."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from remora_agent.bank.bank import Bank, Wanted
from remora_agent.bank.host import HostCache
from remora_agent.runtime.answer import Answer
from remora_agent.runtime.api import (
    Delta,
    Failed,
    Finished,
    FinishReason,
    PromptScored,
    Provenance,
    Scoring,
)
from remora_agent.runtime.jobs import Job, SchedulerLimits
from remora_agent.runtime.pace import LEAST_CHUNK
from remora_agent.runtime.prefix_cache import PrefixCache
from remora_agent.runtime.prefix_keys import BLOCK
from remora_agent.runtime.request import Arrival
from remora_agent.runtime.sampling import Sampler
from remora_agent.runtime.scheduler import Scheduler
from remora_agent.runtime.work import DecodeStep, PrefillChunk
from remora_contract.errors import Exhausted, InternalFault, Unavailable
from tests.agent.runtime.test_step_model import (
    CONTEXT,
    RANK,
    ROWS,
    TOKEN_BYTES,
    Slow,
    Steps,
    world,
)
from tests.support.reference_engine import ReferenceEngine
from tests.support.runtime import VOCAB, byte_text, request


class SpareSteps(Steps):
    def __init__(self):
        super().__init__()
        self.waiting, self.spares = deque(), {}
        self.spare_rows = {}
        self.stepper.spare.take_from(self, lambda arrival, *_: arrival)
        began = self.scheduler.run_spare

        def run_spare(job, row):
            assert self.scheduler.idle
            began(job, row)
            self.spare_rows[job.request_id] = row

        self.scheduler.run_spare = run_spare

    def next(self):
        """What `take_from` is to call; an arrival stands for the request here."""
        return (self.waiting.popleft(), None, None) if self.waiting else None

    def close(self):
        self.waiting.clear()

    @rule(
        blocks=st.integers(0, 2),
        count=st.integers(1, 6),
        adapter=st.sampled_from(["", "a", "b"]),
        scored=st.booleans(),
    )
    def spare(self, blocks, count, adapter, scored):
        name = f"spare{self.count}"
        self.count += 1
        prompt = (*range(blocks * BLOCK), 5, 6, 7)
        mix = {adapter: 1.0} if adapter else {}
        made = request(name, prompt, count, mix)
        if scored:
            made = replace(made, scoring=Scoring(prompt_top=1, prompt_from=len(prompt) - 1))
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
        wanted = tuple(Wanted(self.records[n], w) for n, w in mix.items())
        job = Job(name, len(prompt), None, (), count, is_spare=True)
        self.spares[name] = made, events
        self.waiting.append(Arrival(answer, wanted, job))

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            self.now += 0.01
            if self.scheduler.empty and not self.bank.preloading:
                self.step_of_nobody()
            else:
                self.step_of_somebody()

    def step_of_nobody(self):
        """No adapter comes, goes or counts as used, and no prefix that somebody left is lost."""
        adds, removes = len(self.engine.calls.adds), len(self.engine.calls.removes)
        used = {p.digest: p.used for p in self.bank.snapshot.places}
        counters, prefixes = self.bank.snapshot.counters, self.known_prefixes()
        self.stepper.step()
        assert len(self.engine.calls.adds) == adds and len(self.engine.calls.removes) == removes
        assert {p.digest: p.used for p in self.bank.snapshot.places} == used
        assert self.bank.snapshot.counters == counters
        assert prefixes <= self.known_prefixes()

    def step_of_somebody(self):
        """No row of spare work is computed; the first in the queue begins at once where nothing
        but spare work was in its way."""
        calls = self.engine.calls
        spare = {r for n, r in self.spare_rows.items() if not self.ended(n)}
        before = len(calls.prefills), len(calls.decodes), len(calls.scores)
        alone = not self.scheduler.running() and self.free == 1 << 40
        first = next(iter(self.scheduler.waiting()), None) if alone else None
        self.stepper.step()
        rows = [row for row, *_ in calls.prefills[before[0] :]]
        rows += [row for row, *_ in calls.scores[before[2] :]]
        rows += [row for one in calls.decodes[before[1] :] for row in one]
        real = {row for row, _ in self.scheduler.running()}
        assert not (set(rows) & spare) - real
        if first is not None and not self.sent[first].adapters:
            assert first not in self.scheduler.waiting()

    def known_prefixes(self):
        rows = {key for held in self.prefixes._held for key in held}
        return rows | set(self.prefixes._store._blocks)

    @rule(name=st.sampled_from("ab"))
    def preload(self, name):
        """An operator's adapter comes, whatever nobody's work holds."""
        mixed = [j for _, j in self.scheduler.running() if self.sent[j.request_id].adapters]
        waits = [n for n in self.scheduler.waiting() if self.sent[n].adapters]
        done = Future()
        self.bank.preload(self.records[name], done)
        self.stepper.step()
        self.load()
        self.stepper.step()
        draining = any(p.draining for p in self.bank.snapshot.places)
        assert done.done() or (mixed and draining)  # it comes back when its last request has ended
        if not mixed and not waits:
            done.result()
            assert self.bank.snapshot.place(self.records[name].digest) is not None

    @rule(name=st.sampled_from("ab"))
    def unload(self, name):
        """As Adapters.unload: it leaves at once, unless somebody's request uses it."""
        record = self.records[name]
        self.stepper.end_spare()
        used = [j for _, j in self.scheduler.running() if self.sent[j.request_id].adapters]
        self.bank.unload(record)
        place = self.bank.snapshot.place(record.digest)
        assert place is None or (place.draining and used)

    def ended(self, name):
        return any(isinstance(e, Finished | Failed) for e in self.spares[name][1])

    @invariant()
    def each_is_somewhere_once(self):
        running = {job.request_id for _, job in self.scheduler.running()}
        here = {n for n in self.sent if self.end_of(n) is None and n not in self.moved}
        assert set(self.scheduler.waiting()) | running == here
        spare = [r for n, r in self.spare_rows.items() if not self.ended(n)]
        assert len(spare) <= 1
        rows = [row for row, _ in self.scheduler.running()] + spare
        assert sorted([*rows, *self.scheduler.free_rows]) == list(range(ROWS))
        assert self.scheduler.rows_busy == len(running)

    @invariant()
    def people_alone_are_counted(self):
        ended = sum(self.end_of(n) is not None for n in self.sent)
        assert self.stepper._metrics.requests == ended
        heard = (e for events in self.heard.values() for e in events)
        told = sum(len(getattr(e, "token_ids", ())) for e in heard)
        # Bytes that are half a character are drawn before they are told.
        drawn = [r.generating.tokens for r in self.stepper._requests.values() if r.id in self.sent]
        assert told <= self.stepper._metrics.tokens <= told + sum(map(len, drawn)) + self.lost()

    def lost(self):
        """Tokens at most that were drawn and not told before a failure."""
        return 8 * sum(isinstance(self.end_of(n), Failed) for n in self.sent)

    def teardown(self):
        self.free = 1 << 40
        self.engine.faults.clear()
        for _ in range(3000):
            if self.scheduler.idle and not self.waiting:
                break
            self.load()
            self.now += 0.05
            self.stepper.step()
        super().teardown()
        assert self.scheduler.idle
        for name, (made, events) in self.spares.items():
            ends = [e for e in events if isinstance(e, Finished | Failed)]
            assert len(ends) == 1 and events[-1] is ends[0], name
            mix = {self.records[a.name].digest: a.weight for a in made.adapters}
            alone = self.engine.solo(made.prompt, made.stopping.max_tokens, mix)
            tokens = tuple(t for e in events if isinstance(e, Delta) for t in e.token_ids)
            assert alone[: len(tokens)] == tokens
            if isinstance(ends[0], Finished) and ends[0].reason is FinishReason.LENGTH:
                assert tokens == alone
                scored = [len(e.logprobs) for e in events if isinstance(e, PromptScored)]
                assert scored == ([1] if made.scoring.prompt_top is not None else [])


TestSpareSteps = SpareSteps.TestCase
TestSpareSteps.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.fixture
def steps():
    """A history by hand, with adapter a resident."""
    made = SpareSteps()
    made.submit(0, 1, 1, "a", None, 0, "x")
    until(made, lambda: made.scheduler.idle)
    yield made
    made.teardown()


def until(steps, done):
    for _ in range(50):
        if done():
            return
        steps.load()
        steps.now += 0.01
        steps.stepper.step()
    raise AssertionError("nothing happens")


def test_an_operators_preload_takes_the_place_of_what_nobody_waits_for(steps):
    steps.spare(0, 6, "a", False)
    until(steps, lambda: steps.bank.snapshot.leases)
    steps.preload("b")
    assert steps.bank.snapshot.leases == 0
    (_, events), *_ = steps.spares.values()
    assert events[-1].reason is FinishReason.CANCELLED


def test_an_unload_does_not_wait_for_what_nobody_waits_for(steps):
    steps.spare(0, 6, "a", False)
    until(steps, lambda: steps.bank.snapshot.leases)
    steps.unload("a")
    assert steps.bank.snapshot.places == ()


def test_who_comes_while_work_is_looked_for_is_first(steps):
    steps.spare(0, 6, "", False)
    look = steps.next

    def next_one():
        found = look()
        if found is not None:
            steps.submit(0, 3, 2, "", None, 0, "x")
        return found

    steps.next = next_one
    until(steps, lambda: not steps.waiting)
    (_, events), *_ = steps.spares.values()
    assert isinstance(events[-1].error, Exhausted)
    assert not steps.spare_rows and steps.scheduler.waiting()


def test_nothing_begins_once_requests_are_refused_and_what_runs_ends(steps):
    steps.spare(0, 6, "a", False)
    until(steps, lambda: steps.bank.snapshot.leases)
    steps.spare(0, 6, "a", False)
    steps.stepper.refuse(Unavailable("draining"))
    for _ in range(3):
        steps.stepper.step()
    assert steps.scheduler.idle and steps.bank.snapshot.leases == 0
    assert len(steps.spare_rows) == 1 and len(steps.waiting) == 1
    steps.stepper.fail_all(Unavailable("closed"))
    assert not steps.waiting  # the source was told
    steps.spares.popitem()


@pytest.mark.parametrize("copies", [True, False])
def test_a_prefix_that_is_nowhere_else_is_not_overwritten(copies):
    """Both rows hold somebody's; the copies have both, one or none."""
    engine = ReferenceEngine(ROWS, CONTEXT, VOCAB, 2 * RANK, copies_kv=copies)
    prefixes = PrefixCache(engine, 8 * BLOCK * TOKEN_BYTES)
    for row, first in enumerate((1, 2)):
        prompt = (first,) * (2 * BLOCK + 1)
        engine.prefill(row, np.array(prompt), 0)
        prefixes.wrote(row, prefixes.keys("", (), prompt), prompt, len(prompt))
    assert prefixes.spare_row((0, 1)) == (0 if copies else None)
    prefixes.lost(1)
    assert prefixes.spare_row((0, 1)) == 1
    assert prefixes.spare_row((0,)) == (0 if copies else None)


LIMITS = SchedulerLimits(2, 4, 500, 64)


def spare_job(name="s", tokens=40):
    return Job(name, tokens, max_new=4, is_spare=True)


def test_spare_work_begins_only_while_nothing_waits_or_runs():
    scheduler = Scheduler(LIMITS)
    scheduler.submit(Job("a", 3), 0.0)
    with pytest.raises(InternalFault):
        scheduler.run_spare(spare_job(), 0)
    scheduler.admit("a", 0.0)
    with pytest.raises(InternalFault):
        scheduler.run_spare(spare_job(), scheduler.free_rows[0])


def test_spare_work_begins_when_nobody_was_here_for_a_moment():
    """Who has just left often comes back: a caller that pauses for less never meets it."""
    scheduler = Scheduler(SchedulerLimits(2, 4, 500, 64, spare_after_s=0.25))
    assert scheduler.spare_in_s(0.0) == 0.0  # nobody ever came
    scheduler.submit(Job("a", 3), 1.0)
    assert scheduler.spare_in_s(9.0) == float("inf")
    scheduler.admit("a", 1.0)
    assert scheduler.spare_in_s(9.0) == float("inf")
    scheduler.end("a", 2.0)
    assert scheduler.spare_in_s(2.125) == 0.125
    scheduler.run_spare(spare_job(), 0)
    scheduler.end("s", 3.0)
    assert scheduler.spare_in_s(3.0) == 0.0  # the next piece follows at once


def test_spare_work_is_read_in_small_pieces():
    scheduler = Scheduler(LIMITS)
    scheduler.run_spare(spare_job(), 1)
    assert scheduler.next_work() == PrefillChunk("s", 1, 0, LEAST_CHUNK, False)


def test_the_first_request_ends_spare_work_before_the_next_step():
    scheduler = Scheduler(LIMITS)
    scheduler.run_spare(spare_job(tokens=10), 1)
    scheduler.done(scheduler.next_work(), 0.01)
    assert isinstance(scheduler.next_work(), DecodeStep)
    scheduler.submit(Job("a", 3), 0.0)
    assert scheduler.next_work() is None
    assert [e.request_id for e in scheduler.reap(0.0)] == ["s"]
    assert scheduler.admit("a", 0.0) in (0, 1)
    assert scheduler.next_work().request_id == "a"


def test_spare_work_takes_no_place_and_no_time_of_anybody():
    """Of a queue of one with one row, and of the estimate by which a deadline is refused."""
    scheduler = Scheduler(SchedulerLimits(1, 1, 500, 64))
    scheduler.submit(Job("a", 4, max_new=2), 0.0)
    scheduler.admit("a", 0.0)
    for _ in range(2):
        scheduler.done(scheduler.next_work(), 1.0)
    scheduler.end("a", 2.0)
    alone = scheduler.expected_wait(Job("b", 4, max_new=2), 2.0)
    scheduler.run_spare(spare_job(tokens=400), 0)
    scheduler.done(scheduler.next_work(), 100.0)
    assert scheduler.expected_wait(Job("b", 4, max_new=2), 2.0) == alone
    assert (scheduler.rows_busy, scheduler.queued, scheduler.empty) == (0, 0, True)
    scheduler.submit(Job("b", 4, 2.0 + alone.first_token_s + 1.0, max_new=2), 2.0)
    with pytest.raises(Exhausted):
        scheduler.submit(Job("c", 4, max_new=2), 2.0)


def test_a_spare_lease_is_no_use_makes_no_room_and_counts_nowhere():
    records, weights = world()
    host = HostCache(1 << 30)
    engine = ReferenceEngine(ROWS, CONTEXT, VOCAB, 2 * RANK)
    bank = Bank(engine, host, Slow(), lambda: 0.0)
    a, b = (Wanted(records[name], 0.5) for name in "ab")
    assert bank.acquire_resident([a]) is None
    for wanted in (a, b):
        bank.prefetch([[wanted]])
        bank.loaded(wanted.adapter.digest, weights[wanted.adapter.digest])
        bank.release(bank.acquire([wanted]))
    before, used = bank.snapshot.counters, [p.used for p in bank.snapshot.places]
    lease = bank.acquire_resident([a])
    assert lease is not None and bank.snapshot.leases == 1
    assert bank.snapshot.counters == before
    assert [p.used for p in bank.snapshot.places] == used
    bank.unload(records["a"])
    assert bank.acquire_resident([a]) is None  # it leaves with its last lease
    bank.release(lease)
    assert bank.snapshot.place(records["a"].digest) is None and bank.snapshot.leases == 0
