"""However a request ends, its adapters are let go exactly once: random lives of a whole runtime."""

from contextlib import ExitStack

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from remora_agent.bank.directory import AdapterDirectory
from remora_agent.bank.policy import Size
from remora_agent.runtime.adapters import UnloadMode
from remora_agent.runtime.api import Failed, Finished
from remora_agent.runtime.options import RuntimeOptions
from remora_contract.errors import Exhausted, Refused
from tests.agent.runtime.manual import manual_runtime
from tests.support.reference_engine import ReferenceEngine, fault
from tests.support.runtime import VOCAB, add_adapter, make_bundle, request

RANKS = {"a": 4, "b": 4, "c": 8, "d": 12}
MAX_RANK, ROWS = 16, 3
BUNDLE = make_bundle(64, MAX_RANK)

NAMES = st.sampled_from("abcd")
MIXES = st.lists(NAMES, max_size=3, unique=True).filter(
    lambda names: sum(RANKS[n] for n in names) <= MAX_RANK
)


class Listener:
    """Counts what is heard; one that is gone raises, as a closed event loop does."""

    def __init__(self, hears):
        self.last_events, self.gone = 0, False
        self._hears = hears

    def __call__(self, event):
        self.last_events += isinstance(event, Finished | Failed)
        self._hears -= 1
        if self._hears < 0:
            self.gone = True
            raise RuntimeError("Event loop is closed")


class Life(RuleBasedStateMachine):
    def __init__(self, adapters):
        super().__init__()
        self.now, self.count, self.listeners = 0.0, 0, {}
        self.engine = ReferenceEngine(ROWS, 64, VOCAB, MAX_RANK)
        directory = AdapterDirectory(BUNDLE)
        for record in adapters:
            directory.register(record.name, record.revision, record.directory)
        two_largest = sorted(r.bytes for r in adapters)[-2:]
        options = RuntimeOptions(
            max_waiting=8,
            patience_s=3.0,
            host_bytes=sum(two_largest),
            bank_bytes=sum(r.bank_bytes for r in adapters if r.name in "cd") // 2,
        )
        self.stack = ExitStack()
        self.runtime, self.loop, self.reads = self.stack.enter_context(
            manual_runtime(self.engine, BUNDLE, directory, options=options, clock=lambda: self.now)
        )

    @property
    def bank(self):
        return self.runtime._bank.snapshot

    @rule(
        mix=MIXES,
        max_tokens=st.integers(1, 5),
        timeout=st.none() | st.integers(1, 6),
        hears=st.sampled_from([0, 1, 2, 99, 99, 99]),
        prompt=st.integers(1, 9),
    )
    def submit(self, mix, max_tokens, timeout, hears, prompt):
        name, listener = f"{self.count}", Listener(hears)
        self.count += 1
        deadline_s = None if timeout is None else self.now + timeout
        asked = request(
            name, (1,) * prompt, max_tokens, dict.fromkeys(mix, 1.0), deadline_s=deadline_s
        )
        try:
            self.runtime.submit(asked, listener)
        except Exhausted:  # the queue is full, or pins leave no room
            return
        self.listeners[name] = listener

    @rule(seconds=st.integers(0, 3), steps=st.integers(1, 5))
    def go_on(self, seconds, steps):
        self.now += seconds
        for _ in range(steps):
            self.loop.step()

    @precondition(lambda self: self.reads.in_flight)
    @rule(broken=st.booleans())
    def finish_read(self, broken):
        self.reads.finish(broken=broken)

    @precondition(lambda self: self.listeners)
    @rule(data=st.data())
    def cancel(self, data):
        self.runtime.cancel(data.draw(st.sampled_from(sorted(self.listeners))))

    @rule()
    def engine_fails(self):
        self.engine.faults = [fault()]

    @rule(name=NAMES, mode=st.sampled_from(UnloadMode))
    def unload(self, name, mode):
        try:
            self.runtime.adapters.unload(name, mode=mode)
        except Refused:
            info = self.runtime.adapters.info(name)
            assert info.pinned or (mode is UnloadMode.REFUSE_IF_BUSY and info.leases)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name, pinned):
        record = self.runtime.adapters.directory.resolve(name)
        try:
            if pinned:
                self.runtime._bank.pin(record, self.runtime.adapters.directory.revisions())
            else:
                self.runtime.adapters.pin(name, pinned=False)
        except Refused:
            assert pinned

    @rule(revision=st.sampled_from(["r1", "r2"]))
    def swap(self, revision):
        self.runtime.adapters.set_alias("a", revision)

    @invariant()
    def the_books_agree(self):
        bank, limits = self.bank, self.bank.limits
        assert bank.leases <= self.runtime.status().rows_busy <= ROWS
        assert limits.hold(bank.used) and bank.host_bytes <= bank.host_max_bytes
        in_engine = list(self.engine.calls.adds)
        for digest in self.engine.calls.removes:
            in_engine.remove(digest)
        assert sorted(in_engine) == sorted(p.digest for p in bank.places)
        assert all(heard.last_events <= 1 for heard in self.listeners.values())

    def teardown(self):
        try:
            if self.count % 2:
                self._run_dry()
            # Otherwise the runtime is closed in the middle, as at an engine swap.
        finally:
            self.stack.close()
        assert self.engine.closed
        self._check_all_heard_their_end()
        assert (self.bank.used, self.bank.host_bytes) == (Size(), 0)
        assert not self.bank.places and not self.bank.in_host

    def _run_dry(self):
        for digest in list(self.bank.pinned):
            self.runtime._bank.unpin(digest)
        self.engine.faults = []
        for _ in range(2000):
            status = self.runtime.status()
            if not status.rows_busy and not status.queued:
                break
            self.now += 0.5
            self.loop.step()
            if self.reads.in_flight:
                self.reads.finish()
        self._check_all_heard_their_end()
        while self.reads.in_flight:
            self.reads.finish()
        for info in self.runtime.adapters.list():
            assert (info.leases, info.draining) == (0, False)
            self.runtime.adapters.unload(info.name, info.revision)
        assert (self.bank.used, self.bank.host_bytes) == (Size(), 0)

    def _check_all_heard_their_end(self):
        status = self.runtime.status()
        assert (self.bank.leases, status.rows_busy, status.queued) == (0, 0, 0)
        assert all(h.last_events == 1 or h.gone for h in self.listeners.values())


def test_leases_rows_and_memory_are_back_at_zero_whatever_happened(tmp_path):
    directory = AdapterDirectory(BUNDLE)
    adapters = [
        add_adapter(directory, BUNDLE, tmp_path / f"{name}{r}", name, f"r{r}", seed=seed, r=rank)
        for seed, (name, rank) in enumerate(RANKS.items())
        for r in ((1, 2) if name == "a" else (1,))
        for seed in (10 * seed + r,)
    ]
    run_state_machine_as_test(
        lambda: Life(adapters),
        settings=settings(
            max_examples=50,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
