"""The bank on the reference engine: any history keeps its promises."""

import gc
import itertools
import traceback
import weakref
from concurrent.futures import Future
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from remora_agent.bank.bank import Bank, Wanted
from remora_agent.bank.directory import Registered
from remora_agent.bank.host import HostCache
from remora_contract.errors import (
    AdapterInvalid,
    ArtifactInvalid,
    Exhausted,
    InternalFault,
    Refused,
)
from tests.agent.bank.crowd import ManualLoader
from tests.support.reference_engine import ReferenceEngine, make_weights

RANKS = {"a": 4, "b": 4, "c": 8, "d": 12, "e": 2}
WEIGHTS = {name: make_weights(name, rank) for name, rank in RANKS.items()}
KNOWN = {
    name: Registered(name, "r1", w.digest, Path(name), w.rank, w.bytes, w.bank_bytes)
    for name, w in WEIGHTS.items()
}
BY_DIGEST = {w.digest: w for w in WEIGHTS.values()}
MAX_RANK = 16
HOST_BYTES = sum(WEIGHTS[n].bytes for n in "bd")  # the two largest that fit together


def make(host_bytes=1 << 20):
    engine, loader = ReferenceEngine(max_bank_rank=MAX_RANK), ManualLoader()
    clock = itertools.count().__next__
    return Bank(engine, HostCache(host_bytes), loader, clock), loader, engine


def want(*names, weight=1.0):
    return [Wanted(KNOWN[n], weight) for n in names]


def load(bank, loader, *names):
    for name in names:
        bank.prefetch([want(name)])
        bank.loaded(KNOWN[name].digest, WEIGHTS[name])


def resident(bank):
    return {p.digest: p for p in bank.snapshot.places}


def test_an_adapter_is_read_then_resident_then_leased():
    bank, loader, engine = make()
    assert bank.acquire(want("a")) is None
    bank.prefetch([want("a")])
    assert loader.in_flight == [KNOWN["a"].digest]
    bank.loaded(KNOWN["a"].digest, WEIGHTS["a"])
    lease = bank.acquire(want("a", weight=0.5))
    assert [e.weight for e in lease.mix] == [0.5]
    assert resident(bank)[KNOWN["a"].digest].leases == 1
    bank.release(lease)
    assert resident(bank)[KNOWN["a"].digest].leases == 0
    assert engine.calls.adds == [KNOWN["a"].digest]
    assert (bank.snapshot.counters.loads, bank.snapshot.counters.hits) == (1, 0)


def test_requests_that_are_composed_are_counted():
    bank, loader, _ = make()
    load(bank, loader, "a", "b")
    for wanted in (want("a"), want("a", weight=0.5), want("a", "b"), want("b"), want()):
        bank.release(bank.acquire(wanted))
    assert bank.snapshot.counters.compositions == 2


def test_a_second_release_is_our_own_fault():
    bank, loader, _ = make()
    load(bank, loader, "a")
    lease = bank.acquire(want("a"))
    bank.release(lease)
    with pytest.raises(InternalFault):
        bank.release(lease)


def test_the_same_bytes_under_two_names_are_one_place_with_the_weights_added():
    bank, loader, engine = make()
    load(bank, loader, "a")
    other = Wanted(Registered("alias", "r1", KNOWN["a"].digest, Path("a"), 4, 1, 1), 0.25)
    lease = bank.acquire([*want("a"), other])
    assert [e.weight for e in lease.mix] == [1.25]
    assert len(engine.calls.adds) == 1


def test_what_is_leased_stays_and_a_request_without_room_waits():
    bank, loader, engine = make()
    load(bank, loader, "d", "c")
    lease = bank.acquire(want("d"))
    assert bank.acquire(want("c")) is None
    bank.release(lease)
    assert bank.acquire(want("c")) is not None
    assert engine.calls.removes == [KNOWN["d"].digest]
    assert bank.snapshot.counters.evictions == 1


def test_a_broken_file_fails_once_and_is_told_apart_from_waiting():
    bank, *_ = make()
    bank.prefetch([want("a")])
    bank.loaded(KNOWN["a"].digest, ArtifactInvalid("damaged"))
    assert list(bank.take_failures()) == [KNOWN["a"].digest]
    assert not bank.take_failures()
    assert bank.acquire(want("a")) is None


def test_graceful_unload_waits_for_the_last_release_and_takes_no_new_lease():
    bank, loader, engine = make()
    load(bank, loader, "a")
    lease = bank.acquire(want("a"))
    bank.unload(KNOWN["a"])
    assert resident(bank)[KNOWN["a"].digest].draining
    assert bank.acquire(want("a")) is None
    bank.release(lease)
    assert not resident(bank) and not bank.snapshot.in_host
    assert engine.calls.removes == [KNOWN["a"].digest]


def test_an_adapter_that_the_engine_refuses_keeps_nothing_of_who_asks():
    bank, _, engine = make()
    engine.add_adapter = refuse
    weights, lengths = make_weights("a", RANKS["a"]), []
    seen = weakref.ref(weights)
    bank.prefetch([want("a")])
    bank.loaded(weights.digest, weights)
    del weights
    for _ in range(5):
        with pytest.raises(AdapterInvalid) as caught:
            bank.acquire(want("a"))
        lengths.append(len(list(traceback.walk_tb(caught.value.__traceback__))))
        del caught
    bank._intake.drop(KNOWN["a"].digest)
    gc.collect()
    assert seen() is None
    assert len(set(lengths[1:])) == 1


def refuse(weights):
    raise AdapterInvalid("its shape is another")


def test_unload_refuses_what_is_pinned_or_busy_when_asked():
    bank, loader, _ = make()
    load(bank, loader, "a", "b")
    bank.acquire(want("a"))
    with pytest.raises(Refused, match="used by 1"):
        bank.check_unload(KNOWN["a"], refuse_if_busy=True)
    bank.pin(KNOWN["b"], ())
    with pytest.raises(Refused, match="pinned"):
        bank.unload(KNOWN["b"])
    bank.unpin(KNOWN["b"].digest)
    bank.unload(KNOWN["b"])
    assert KNOWN["b"].digest not in resident(bank)


def test_pins_leave_room_for_the_largest_other_adapter():
    bank, *_ = make()
    everything = [KNOWN[n] for n in "abc"]
    bank.pin(KNOWN["a"], everything)
    bank.pin(KNOWN["b"], everything)
    with pytest.raises(Refused, match="like d, which needs rank 12"):
        bank.pin(KNOWN["e"], [*everything, KNOWN["d"]])
    with pytest.raises(Exhausted, match="pinned"):
        bank.check_fits(want("d"))
    bank.check_fits(want("c"))


def test_a_mix_larger_than_host_memory_is_refused_by_numbers():
    bank, *_ = make(host_bytes=WEIGHTS["a"].bytes)
    with pytest.raises(Exhausted, match="host memory"):
        bank.check_fits(want("a", "b"))


def test_a_preload_tells_when_it_is_resident_or_why_not():
    bank, *_ = make()
    done, busy, broken = Future(), Future(), Future()
    bank.preload(KNOWN["d"], done)
    bank.prefetch([])
    bank.loaded(KNOWN["d"].digest, WEIGHTS["d"])
    assert not bank.serve_preloads() and done.result(0) is None
    bank.acquire(want("d"))
    bank.preload(KNOWN["c"], busy)
    bank.prefetch([])
    bank.loaded(KNOWN["c"].digest, WEIGHTS["c"])
    bank.serve_preloads()
    assert isinstance(busy.exception(0), Exhausted)
    bank.preload(KNOWN["a"], broken)
    bank.prefetch([])
    bank.loaded(KNOWN["a"].digest, ArtifactInvalid("damaged"))
    bank.take_failures()
    assert isinstance(broken.exception(0), ArtifactInvalid)


def test_two_requests_that_do_not_fit_host_memory_together_are_both_served():
    """Each needs two adapters; what one loads must not push out what the other loaded."""
    bank, loader, _ = make(host_bytes=HOST_BYTES)
    waiting = [want("a", "b"), want("c", "e"), want("d", "e")]
    for _ in range(40):
        bank.prefetch(waiting)
        for digest in list(loader.in_flight):
            bank.loaded(digest, BY_DIGEST[digest])
        if waiting and (lease := bank.acquire(waiting[0])):
            bank.release(lease)
            waiting.pop(0)
    assert not waiting


MIXES = st.lists(st.sampled_from("abcde"), min_size=1, max_size=3, unique=True).filter(
    lambda names: sum(RANKS[n] for n in names) <= MAX_RANK
)


class History(RuleBasedStateMachine):
    """Random leases, loads, pins, unloads and breakages."""

    def __init__(self):
        super().__init__()
        self.bank, self.loader, self.engine = make(HOST_BYTES)
        self.leases, self.waiting = [], []

    @rule(names=MIXES)
    def request(self, names):
        try:
            self.bank.check_fits(want(*names))
        except Exhausted:
            return
        self.waiting.append(names)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data):
        names = data.draw(st.sampled_from(self.waiting))
        held = {p.digest: p for p in self.bank.snapshot.places}
        try:
            lease = self.bank.acquire(want(*names))
        except Exhausted:  # pinned meanwhile
            self.waiting.remove(names)
            return
        gone = held.keys() - resident(self.bank).keys()
        assert all(held[d].idle for d in gone)
        if lease is not None:
            self.waiting.remove(names)
            self.leases.append(lease)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data):
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        self.bank.release(lease)

    @rule()
    def prefetch(self):
        self.bank.prefetch(want(*names) for names in self.waiting)

    @precondition(lambda self: self.loader.in_flight)
    @rule(broken=st.booleans())
    def finish_load(self, broken):
        digest = self.loader.in_flight[0]
        self.bank.loaded(digest, ArtifactInvalid("x") if broken else BY_DIGEST[digest])
        failed = self.bank.take_failures()
        self.waiting = [
            names for names in self.waiting if not {KNOWN[n].digest for n in names} & failed.keys()
        ]

    @rule(name=st.sampled_from("abcde"))
    def unload(self, name):
        try:
            self.bank.unload(KNOWN[name])
        except Refused:
            assert KNOWN[name].digest in self.bank.snapshot.pinned

    @rule(name=st.sampled_from("abcde"), pinned=st.booleans())
    def pin(self, name, pinned):
        if not pinned:
            self.bank.unpin(KNOWN[name].digest)
            return
        try:
            self.bank.pin(KNOWN[name], [KNOWN[n] for n in "abe"])
        except Refused:
            assert KNOWN[name].digest not in self.bank.snapshot.pinned

    @invariant()
    def promises(self):
        snapshot = self.bank.snapshot
        assert snapshot.used.rank <= MAX_RANK
        held = {}
        for lease in self.leases:
            for digest in lease.digests:
                held[digest] = held.get(digest, 0) + 1
        assert {p.digest: p.leases for p in snapshot.places if p.leases} == held
        assert snapshot.leases == len(self.leases)
        in_engine = list(self.engine.calls.adds)
        for digest in self.engine.calls.removes:
            in_engine.remove(digest)
        assert sorted(in_engine) == sorted(p.digest for p in snapshot.places)
        assert sum(BY_DIGEST[d].bytes for d in snapshot.in_host) <= HOST_BYTES

    def teardown(self):
        for lease in self.leases:
            self.bank.release(lease)
        assert all(p.leases == 0 for p in self.bank.snapshot.places)
        assert not any(p.draining for p in self.bank.snapshot.places)
        assert self.bank.snapshot.leases == 0


TestHistory = History.TestCase
