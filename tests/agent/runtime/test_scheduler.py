"""The scheduler alone: order, fairness, bounds; then any history at all by hypothesis."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from remora_agent.runtime.jobs import Job, SchedulerLimits
from remora_agent.runtime.scheduler import EndCause, Ended, Scheduler
from remora_agent.runtime.work import DecodeStep, PrefillChunk
from remora_contract.errors import Conflict, Exhausted, InternalFault

LIMITS = SchedulerLimits(rows=2, max_waiting=4, max_waiting_tokens=40, prefill_chunk=4)


def make(**changes):
    return Scheduler(SchedulerLimits(**{**vars(LIMITS), **changes}))


def filled(*jobs, admit=True):
    scheduler = make(rows=len(jobs))
    for name, tokens in jobs:
        scheduler.submit(Job(name, tokens), 0.0)
        if admit:
            scheduler.admit(name, 0.0)
    return scheduler


def run(scheduler, steps):
    works = []
    for _ in range(steps):
        works.append(scheduler.next_work())
        scheduler.done(works[-1])
    return works


def test_a_prompt_is_read_in_chunks_and_only_the_last_gives_a_token():
    works = run(filled(("a", 10)), 4)
    assert [(w.start, w.stop, w.last) for w in works[:3]] == [
        (0, 4, False),
        (4, 8, False),
        (8, 10, True),
    ]
    assert works[3] == DecodeStep(("a",), (0,))


def test_chunks_of_a_long_prompt_alternate_with_decode_steps():
    scheduler = filled(("a", 1), ("b", 12))
    works = run(scheduler, 6)
    kinds = [type(w).__name__[0] for w in works]
    assert kinds == ["P", "D", "P", "D", "P", "D"]
    assert works[0].request_id == "a" and {w.request_id for w in works[2::2]} == {"b"}
    assert run(scheduler, 2)[-1].request_ids == ("a", "b")


def test_steps_go_on_beside_a_chunk_that_was_begun_and_the_next_one_follows_at_once():
    scheduler = filled(("a", 1), ("b", 12))
    scheduler.done(scheduler.next_work())
    scheduler.done(scheduler.next_work())
    chunk = scheduler.next_work()
    assert isinstance(chunk, PrefillChunk) and scheduler.any_decodes
    scheduler.begin(chunk)
    for _ in range(3):
        work = scheduler.next_work()
        assert work == DecodeStep(("a",), (0,))
        scheduler.done(work)
    with pytest.raises(InternalFault):
        scheduler.begin(chunk)
    scheduler.done(chunk)
    following = scheduler.next_work()
    assert isinstance(following, PrefillChunk) and following.start == chunk.stop


def test_a_request_whose_chunk_was_begun_keeps_its_row_until_it_is_done():
    scheduler = filled(("a", 1), ("b", 12))
    scheduler.done(scheduler.next_work())
    scheduler.done(scheduler.next_work())
    chunk = scheduler.next_work()
    scheduler.begin(chunk)
    assert scheduler.cancel("b") and scheduler.reap(0.0) == ()
    scheduler.end("a", 0.0)
    assert scheduler.next_work() is None and not scheduler.any_decodes
    scheduler.done(chunk)
    assert scheduler.reap(0.0) == (Ended("b", EndCause.CANCELLED),)
    scheduler = filled(("a", 1), ("b", 12))
    scheduler.done(scheduler.next_work())
    scheduler.done(scheduler.next_work())
    scheduler.begin(scheduler.next_work())
    scheduler.end("b", 0.0)  # it failed
    assert scheduler.next_work() == DecodeStep(("a",), (0,))


def test_work_stays_the_same_until_it_is_done():
    scheduler = filled(("a", 10))
    assert scheduler.next_work() == scheduler.next_work()


def test_nothing_to_do_is_none():
    assert make().next_work() is None
    assert filled(("a", 3), admit=False).next_work() is None


def test_candidates_are_in_the_order_of_arrival_and_none_without_a_free_row():
    scheduler = make()
    for name in "abc":
        scheduler.submit(Job(name, 1), 0.0)
    assert scheduler.candidates(0.0) == ("a", "b", "c")
    scheduler.admit("a", 0.0)
    scheduler.admit("b", 0.0)
    assert scheduler.candidates(0.0) == ()
    with pytest.raises(InternalFault):
        scheduler.admit("c", 0.0)


def test_the_queue_is_bounded_by_count_and_says_when_to_come_back():
    scheduler = make()
    for i in range(4):
        scheduler.submit(Job(str(i), 1, client=str(i)), 0.0)
    with pytest.raises(Exhausted, match="4 requests") as caught:
        scheduler.submit(Job("late", 1), 0.0)
    assert caught.value.retry_after_s > 0
    assert scheduler.queued == 4


def test_the_queue_is_bounded_by_tokens_but_takes_one_prompt_of_any_length():
    scheduler = make()
    scheduler.submit(Job("long", 100), 0.0)
    with pytest.raises(Exhausted, match="100 tokens"):
        scheduler.submit(Job("more", 1), 0.0)
    scheduler.admit("long", 0.0)
    scheduler.submit(Job("more", 1), 0.0)


def test_an_id_in_use_is_a_conflict_while_it_runs():
    scheduler = filled(("a", 1))
    with pytest.raises(Conflict, match="'a'"):
        scheduler.submit(Job("a", 1), 0.0)
    scheduler.end("a", 0.0)
    scheduler.submit(Job("a", 1), 0.0)


def measured(rows=1, **changes):
    """One second a prompt token of a chunk of one, two seconds a step, answers of ten tokens."""
    scheduler = make(rows=rows, **changes)
    scheduler.submit(Job("first", 1, max_new=10), 0.0)
    scheduler.admit("first", 0.0)
    for _ in range(10):
        work = scheduler.next_work()
        scheduler.done(work, 1.0 if isinstance(work, PrefillChunk) else 2.0)
    scheduler.end("first", 19.0)
    return scheduler


def test_a_first_token_after_the_deadline_is_refused_once_speeds_are_known():
    scheduler = make(rows=1)
    scheduler.submit(Job("unknown", 1, deadline_s=0.1), 0.0)
    assert scheduler.reap(1.0) == (Ended("unknown", EndCause.EXPIRED),)
    scheduler = measured()
    with pytest.raises(Exhausted, match="deadline"):
        scheduler.submit(Job("long", 30, deadline_s=20 + 29), 20.0)
    scheduler.submit(Job("runs", 4, deadline_s=25.0, max_new=10), 20.0)
    scheduler.admit("runs", 20.0)
    with pytest.raises(Exhausted, match="deadline") as caught:
        scheduler.submit(Job("late", 1, deadline_s=30.0), 20.0)
    assert 4 + 10 * 2 <= caught.value.retry_after_s <= 4 * 1.5 + 10 * 2
    scheduler.submit(Job("patient", 1, deadline_s=60.0), 20.0)


def test_the_expected_wait_counts_what_goes_before_by_priority():
    scheduler = measured()
    for i in range(3):
        scheduler.submit(Job(f"{i}", 2, max_new=10, client=f"{i}"), 20.0)
    low = scheduler.expected_wait(Job("low", 2, priority=-1, client="x"), 20.0)
    high = scheduler.expected_wait(Job("high", 2, priority=1, client="x"), 20.0)
    assert high.row_s == 0.0 and low.row_s >= 3 * 20


def test_cached_prefixes_shorten_the_expected_wait():
    def expected(reused):
        scheduler = measured(rows=2)
        scheduler.submit(Job("cached", 100, max_new=1), 20.0)
        scheduler.admit("cached", 20.0)
        if reused:
            scheduler.reuse("cached", reused)
        while isinstance(work := scheduler.next_work(), PrefillChunk):
            scheduler.done(work)
        return scheduler.expected_wait(Job("next", 10), 20.0).first_token_s

    assert expected(96) < expected(0)


def test_cancelled_and_expired_requests_leave_at_the_next_reap():
    scheduler = make()
    scheduler.submit(Job("a", 1), 0.0)
    scheduler.admit("a", 0.0)
    scheduler.submit(Job("b", 1, deadline_s=50.0), 0.0)
    scheduler.submit(Job("c", 1), 0.0)
    assert scheduler.cancel("a") and scheduler.cancel("a") and not scheduler.cancel("nobody")
    assert scheduler.next_deadline_s() == 50.0
    assert scheduler.reap(49.0) == (Ended("a", EndCause.CANCELLED),)
    assert scheduler.reap(50.0) == (Ended("b", EndCause.EXPIRED),)
    assert scheduler.waiting() == ("c",) and scheduler.rows_busy == 0


def test_ending_twice_is_our_own_fault():
    scheduler = filled(("a", 1))
    scheduler.end("a", 0.0)
    with pytest.raises(InternalFault):
        scheduler.end("a", 0.0)


class History(RuleBasedStateMachine):
    """Random arrivals, blocked admissions, cancellations, faults and ends on a small machine."""

    def __init__(self):
        super().__init__()
        self.now, self.count = 0.0, 0
        self.scheduler = Scheduler(LIMITS)
        self.alive, self.running, self.read, self.lengths = {}, {}, {}, {}
        self.last_work = None
        self.cancelled = set()

    @rule(
        tokens=st.integers(1, 12),
        deadline=st.none() | st.floats(0, 30),
        priority=st.integers(-1, 1),
        client=st.sampled_from("xyz"),
    )
    def submit(self, tokens, deadline, priority, client):
        name = f"r{self.count}"
        self.count += 1
        until = None if deadline is None else self.now + deadline
        job = Job(name, tokens, until, max_new=3, priority=priority, client=client)
        try:
            self.scheduler.submit(job, self.now)
        except Exhausted:
            return
        self.alive[name], self.lengths[name] = job, tokens

    @rule(blocked=st.sets(st.integers(0, 3)), seconds=st.floats(0, 3))
    def admit(self, blocked, seconds):
        self.now += seconds
        candidates = self.scheduler.candidates(self.now)
        order = list(self.scheduler.waiting())
        assert len(set(candidates)) == len(candidates) and set(candidates) <= set(order)
        flows = {}
        for name in candidates:  # of one client and priority the oldest first, none left out
            job = self.alive[name]
            flows.setdefault((job.client, job.priority), []).append(name)
        for (client, priority), names in flows.items():
            own = [
                n
                for n in order
                if (self.alive[n].client, self.alive[n].priority) == (client, priority)
            ]
            assert names == own[: len(names)]
        for i, name in enumerate(candidates):
            if i in blocked or not self.scheduler.row_free:
                continue
            row = self.scheduler.admit(name, self.now)
            assert row not in self.running.values()
            self.running[name], self.read[name] = row, 0

    @rule(ends=st.booleans())
    def work(self, ends):
        work = self.scheduler.next_work()
        if work is None:
            assert not self.running
            return
        decoding = {n for n in self.running if self.read[n] == self.lengths[n]}
        if isinstance(work, PrefillChunk):
            if decoding:
                assert isinstance(self.last_work, DecodeStep) or self.last_work is None
            assert self.running[work.request_id] == work.row
            assert work.start == self.read[work.request_id]
            assert 0 < work.stop - work.start <= LIMITS.prefill_chunk
            self.read[work.request_id] = work.stop
            assert work.last == (work.stop == self.lengths[work.request_id])
        else:
            assert set(work.request_ids) == decoding
            assert [self.running[n] for n in work.request_ids] == list(work.rows)
        self.scheduler.done(work)
        self.last_work = work if decoding else None
        if ends:
            ids = getattr(work, "request_ids", None) or (work.request_id,)
            self.forget(ids[0])
            self.scheduler.end(ids[0], self.now)

    @rule(part=st.floats(0.1, 1.0))
    def reuse(self, part):
        work = self.scheduler.next_work()
        if not isinstance(work, PrefillChunk):
            return
        name = work.request_id
        tokens = int((self.lengths[name] - self.read[name] - 1) * part)
        if tokens:
            self.scheduler.reuse(name, tokens)
            self.read[name] += tokens
            self.last_work = work

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def withdraw(self, data):
        among = data.draw(st.sets(st.sampled_from(sorted(self.alive))))
        waiting = self.scheduler.waiting()
        gone = self.scheduler.withdraw(among, self.now)
        assert set(gone) == {n for n in waiting if n in among and n not in self.cancelled}
        for name in gone:
            self.forget(name)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def cancel(self, data):
        name = data.draw(st.sampled_from(sorted(self.alive)))
        assert self.scheduler.cancel(name)
        self.cancelled.add(name)

    @rule(seconds=st.floats(0, 10))
    def reap(self, seconds):
        self.now += seconds
        for ended in self.scheduler.reap(self.now):
            job = self.alive[ended.request_id]
            cancelled = ended.cause is EndCause.CANCELLED
            assert cancelled == (ended.request_id in self.cancelled)
            if ended.cause is EndCause.EXPIRED:
                assert job.deadline_s <= self.now
            self.forget(ended.request_id)
        assert all(j.deadline_s is None or j.deadline_s > self.now for j in self.alive.values())

    def forget(self, name):
        del self.alive[name]
        self.running.pop(name, None)
        self.read.pop(name, None)
        self.cancelled.discard(name)

    def teardown(self):
        """Whatever has happened, serving on empties it: no job is lost and none stays for ever."""
        for _ in range(10_000):
            if self.scheduler.empty:
                break
            self.now += 0.1
            for ended in self.scheduler.reap(self.now):
                self.forget(ended.request_id)
            for name in self.scheduler.candidates(self.now):
                if self.scheduler.row_free:
                    self.scheduler.admit(name, self.now)
            work = self.scheduler.next_work()
            if work is None:
                continue
            self.scheduler.done(work, 0.1)
            if isinstance(work, DecodeStep):
                for name in work.request_ids:
                    self.scheduler.end(name, self.now)
                    self.forget(name)
        assert self.scheduler.empty and not self.alive

    @invariant()
    def counts_agree(self):
        assert self.scheduler.rows_busy == len(self.running) <= LIMITS.rows
        assert self.scheduler.queued == len(self.alive) - len(self.running) <= LIMITS.max_waiting
        assert self.scheduler.row_free == (len(self.running) < LIMITS.rows)
        assert self.scheduler.empty == (not self.alive)


TestHistory = History.TestCase
