"""Who gets a row: priorities that age, shares that even out, memory that must be there."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.runtime.fair_share import MAX_REMEMBERED, FairShare
from remora_agent.runtime.jobs import Job, SchedulerLimits
from remora_agent.runtime.memory_floor import MemoryFloor
from remora_agent.runtime.scheduler import Scheduler
from remora_agent.runtime.work import PrefillChunk
from remora_contract.errors import Exhausted

LIMITS = SchedulerLimits(
    rows=2,
    max_waiting=1000,
    max_waiting_tokens=10**6,
    prefill_chunk=64,
    aging_s=10.0,
)


def make(**changes):
    return Scheduler(SchedulerLimits(**{**vars(LIMITS), **changes}))


def serve(scheduler, seconds, now, step_s=1.0, on_admit=lambda job_id, now: None, arrivals=None):
    """Runs the scheduler for a time on an engine whose every call takes `step_s`."""
    left = {}
    until = now + seconds
    while now < until:
        if arrivals:
            arrivals(now)
        for name in scheduler.candidates(now):
            if not scheduler.row_free:
                break
            scheduler.admit(name, now)
            on_admit(name, now)
        work = scheduler.next_work()
        now += step_s
        if work is None:
            continue
        scheduler.done(work, step_s)
        ids = (work.request_id,) if isinstance(work, PrefillChunk) else work.request_ids
        jobs = {job.request_id: job for _, job in scheduler.running()}
        for name in ids:
            if isinstance(work, PrefillChunk) and not work.last:
                continue
            left[name] = left.get(name, jobs[name].max_new) - 1
            if not left[name]:
                scheduler.end(name, now)
    return now


def test_higher_priority_goes_first_and_arrival_decides_among_equals():
    scheduler = make()
    for name, priority in [("a", 0), ("b", 5), ("c", 5), ("d", -1)]:
        scheduler.submit(Job(name, 1, priority=priority), 0.0)
    assert scheduler.candidates(0.0) == ("b", "c", "a", "d")


def test_a_low_priority_request_is_served_while_higher_ones_never_stop_coming():
    scheduler, admitted, count = make(rows=1), {}, 0
    scheduler.submit(Job("low", 1, priority=-3), 0.0)

    def arrivals(now):
        nonlocal count
        while scheduler.queued < 10:
            count += 1
            scheduler.submit(Job(f"high{count}", 1, priority=0, client=f"c{count % 3}"), now)

    serve(scheduler, 100, 0.0, on_admit=admitted.setdefault, arrivals=arrivals)
    assert admitted["low"] <= (3 + 1) * LIMITS.aging_s + 5


def test_one_clients_crowd_does_not_hold_up_another():
    scheduler, admitted = make(rows=1), {}
    for i in range(50):
        scheduler.submit(Job(f"crowd{i}", 1, client="crowd"), 0.0)
    scheduler.submit(Job("single", 1, client="single"), 0.1)
    serve(scheduler, 10, 1.0, on_admit=admitted.setdefault)
    assert "single" in list(admitted)[:2]


def test_a_pause_earns_nothing():
    share = FairShare()
    share.enter("busy")
    share.enter("idle")
    share.leave("idle")
    share.charge("busy", 1000)
    share.enter("idle")
    assert share.start("idle") == share.start("busy") == 1000


def test_strangers_are_forgotten_before_memory_grows():
    share = FairShare()
    share.enter("stays")
    for i in range(5 * MAX_REMEMBERED):
        share.enter(f"{i}")
        share.charge(f"{i}", i + 1)
        share.leave(f"{i}")
    assert len(share._times) <= MAX_REMEMBERED + 2


@settings(max_examples=40, deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=2, max_size=4),
    rows=st.integers(1, 4),
)
def test_clients_that_always_wait_get_tokens_within_the_bound_of_each_other(costs, rows):
    scheduler, served, count = make(rows=rows, aging_s=1e9), [0] * len(costs), 0
    largest = max(prompt + new for prompt, new in costs)

    def arrivals(now):
        nonlocal count
        waiting = [name.split("-")[0] for name in scheduler.waiting()]
        for i, (prompt, new) in enumerate(costs):
            for _ in range(rows + 1 - waiting.count(f"{i}")):
                count += 1
                scheduler.submit(Job(f"{i}-{count}", prompt, max_new=new, client=f"{i}"), now)

    def admitted(name, now):
        served[int(name.split("-")[0])] += sum(costs[int(name.split("-")[0])])

    serve(scheduler, 300, 0.0, on_admit=admitted, arrivals=arrivals)
    assert max(served) - min(served) <= (rows + 1) * largest


def test_a_caller_gets_no_more_by_naming_many_clients():
    scheduler, served, count = make(rows=1), {"many": 0, "one": 0}, 0

    def arrivals(now):
        nonlocal count
        waiting = [name.split("-")[0] for name in scheduler.waiting()]
        for owner in served:
            for _ in range(4 - waiting.count(owner)):
                count += 1
                client = f"{count}" if owner == "many" else ""
                job = Job(f"{owner}-{count}", 4, max_new=2, client=client, owner=owner)
                scheduler.submit(job, now)

    def admitted(name, now):
        served[name.split("-")[0]] += 6

    serve(scheduler, 400, 0.0, on_admit=admitted, arrivals=arrivals)
    assert abs(served["many"] - served["one"]) <= 12


def test_clients_that_one_caller_names_share_its_part_fairly():
    scheduler = make(rows=1)
    for i in range(6):
        scheduler.submit(Job(f"crowd{i}", 2, client="crowd", owner="gateway"), 0.0)
    scheduler.submit(Job("single", 2, client="single", owner="gateway"), 0.1)
    scheduler.submit(Job("other", 2, client="crowd", owner="else"), 0.2)
    admitted = {}
    serve(scheduler, 60, 1.0, on_admit=admitted.setdefault)
    order = list(admitted)
    assert order.index("single") <= 3 and order.index("other") <= 2


def test_what_was_guessed_is_counted_as_what_was_computed():
    scheduler = make()
    scheduler.submit(Job("a", 2, max_new=20, owner="a"), 0.0)
    scheduler.submit(Job("b", 2, max_new=20, owner="b"), 0.0)
    for name in "ab":
        scheduler.admit(name, 0.0)
        work = scheduler.next_work()
        while not isinstance(work, PrefillChunk) or work.request_id != name:
            scheduler.done(work)
            work = scheduler.next_work()
        scheduler.done(work)
    before = {r.job.owner: r.drawn for r in scheduler._running.values()}
    work = scheduler.next_work()
    scheduler.done(work)
    scheduler.drafted("a", 5, 3)
    assert scheduler._running["a"].left.answer == 20 - before["a"] - 4
    drawn = before["a"] + 4
    scheduler.end("a", 0.0)
    assert scheduler._share._owners._times["a"] == 2 + drawn + 2


def test_a_callers_clients_together_leave_places_to_others():
    scheduler = make(max_waiting=8)
    for i in range(7):
        scheduler.submit(Job(f"{i}", 1, client=f"{i}", owner="many"), 0.0)
    with pytest.raises(Exhausted, match="7 requests of this connection"):
        scheduler.submit(Job("more", 1, client="new", owner="many"), 0.0)
    scheduler.submit(Job("other", 1, owner="other"), 0.0)


def test_a_client_cannot_fill_the_whole_queue():
    scheduler = make(max_waiting=8)
    for i in range(6):
        scheduler.submit(Job(f"{i}", 1, client="crowd"), 0.0)
    with pytest.raises(Exhausted, match="of this client") as caught:
        scheduler.submit(Job("one more", 1, client="crowd"), 0.0)
    assert caught.value.retry_after_s > 0
    scheduler.submit(Job("other", 1, client="other"), 0.0)


def test_a_running_answer_moves_between_chunks_that_keep_its_pace():
    scheduler = make(inter_token_s=0.5, prefill_chunk=256)
    scheduler.submit(Job("stream", 1, max_new=500), 0.0)
    scheduler.admit("stream", 0.0)
    scheduler.done(scheduler.next_work(), 0.01)
    scheduler.submit(Job("long", 2000), 0.0)
    scheduler.admit("long", 0.0)
    gap, gaps, token_s = 0.0, [], 0.004
    for _ in range(200):
        work = scheduler.next_work()
        chunk = isinstance(work, PrefillChunk)
        took = (work.stop - work.start) * token_s if chunk else 0.05
        scheduler.done(work, took)
        gap += took
        if not chunk:
            gaps.append(gap)
            gap = 0.0
    assert max(gaps) <= 0.5
    assert len([g for g in gaps if g > 0.25]) > 5  # and no smaller than needed


def test_equal_prompts_are_cut_alike_wherever_their_reading_begins():
    def stops(reused):
        scheduler = make()
        scheduler.submit(Job("a", 300), 0.0)
        scheduler.admit("a", 0.0)
        if reused:
            scheduler.reuse("a", reused)
        found = []
        while isinstance(work := scheduler.next_work(), PrefillChunk):
            found.append(work.stop)
            scheduler.done(work)
        return found

    assert stops(0) == [64, 128, 192, 256, 300]
    assert stops(96) == [128, 192, 256, 300]


# -- memory ---------------------------------------------------------------------------------


class Machine:
    def __init__(self, free):
        self.free, self.now, self.asked = free, 0.0, 0

    def free_bytes(self):
        self.asked += 1
        return self.free

    def clock(self):
        return self.now


def floor(machine, floor_bytes=100, rows=2, token_bytes=10):
    return MemoryFloor(machine.free_bytes, floor_bytes, rows, token_bytes, machine.clock)


def test_a_request_must_leave_the_floor_free_with_all_that_it_may_write():
    memory = floor(Machine(300))
    assert memory.refusal(Job("a", 10, max_new=10), [], [0]) is None
    assert "300 bytes" in memory.refusal(Job("a", 11, max_new=10), [], [0])


def test_what_a_row_held_before_costs_nothing_again():
    memory = floor(Machine(110))
    memory.wrote(1, 20)
    job = Job("a", 10, max_new=10)
    assert memory.refusal(job, [], [0]) is not None
    assert memory.refusal(job, [], [0, 1]) is None and memory.widest([0, 1]) == 1


def test_running_requests_count_with_what_they_may_still_write():
    memory = floor(Machine(300))
    memory.wrote(0, 5)
    running = [(0, Job("runs", 10, max_new=10))]  # 150 bytes to come
    assert memory.refusal(Job("a", 4, max_new=1), running, [1]) is None
    assert memory.refusal(Job("a", 5, max_new=1), running, [1]) is not None


def test_under_the_floor_nothing_is_taken_and_readings_are_not_taken_every_time():
    machine = Machine(99)
    memory = floor(machine)
    memory.wrote(0, 50)
    assert memory.low and memory.refusal(Job("a", 1), [], [0]) is not None
    machine.free = 1000
    assert memory.low and machine.asked == 1
    machine.now = 1.0
    assert not memory.low and memory.refusal(Job("a", 1), [], [0]) is None


def test_without_a_reading_of_memory_nothing_is_refused():
    memory = MemoryFloor(None, 100, 1, 10, lambda: 0.0)
    assert not memory.low and memory.refusal(Job("a", 10**9), [], [0]) is None
