"""A bank with rows and requests around it, on a clock that ticks: scheduling in its plainest form,
first come first served among those that the bank lets in."""

from __future__ import annotations

from pathlib import Path

from remora_agent.bank.bank import Bank, BankOptions, Wanted
from remora_agent.bank.directory import Registered
from remora_agent.bank.host import HostCache
from remora_agent.bank.loader import MAX_IN_FLIGHT
from tests.support.reference_engine import ReferenceEngine, make_weights

RANK = 4


class ManualLoader:
    """Holds the reads until the test lets them finish."""

    def __init__(self):
        self.in_flight = []

    def start(self, adapter):
        if adapter.digest in self.in_flight or len(self.in_flight) >= MAX_IN_FLIGHT:
            return False
        self.in_flight.append(adapter.digest)
        return True

    def finished(self, digest):
        self.in_flight.remove(digest)

    def freed(self):
        pass


class Crowd:
    """`submit` requests by adapter names, `tick` a second. A tick lets all reads finish."""

    def __init__(self, adapters, places, rows, service, turn):
        weights = {f"{i}": make_weights(f"{i}", RANK) for i in range(adapters)}
        self.known = {
            n: Registered(n, "r1", w.digest, Path(n), RANK, w.bytes, w.bank_bytes)
            for n, w in weights.items()
        }
        self.by_digest = {w.digest: w for w in weights.values()}
        self.rows, self.service, self.now = rows, service, 0
        self.waiting, self.running, self.served = [], [], {}
        self.loader = ManualLoader()
        engine = ReferenceEngine(max_bank_rank=places * RANK)
        options = BankOptions(turn_s=turn)
        host = HostCache(1 << 24)
        self.bank = Bank(engine, host, self.loader, lambda: float(self.now), options)

    @property
    def loads(self):
        return self.bank.snapshot.counters.loads

    def submit(self, *names):
        """Its waiting time comes to `served` under the names joined by +."""
        wanted = [Wanted(self.known[n], 1.0) for n in names]
        self.waiting.append(("+".join(names), wanted, self.now))

    def tick(self):
        ended = [lease for until, lease in self.running if until <= self.now]
        self.running = [(until, lease) for until, lease in self.running if until > self.now]
        for lease in ended:
            self.bank.release(lease)
        for request in list(self.waiting):
            if len(self.running) == self.rows:
                break
            name, wanted, since = request
            if (lease := self.bank.acquire(wanted)) is not None:
                self.waiting.remove(request)
                self.running.append((self.now + self.service, lease))
                self.served.setdefault(name, []).append(self.now - since)
        self.bank.prefetch(wanted for _, wanted, _ in self.waiting)
        for digest in list(self.loader.in_flight):
            self.bank.loaded(digest, self.by_digest[digest])
        self.now += 1

    def drain(self):
        """Until all are served and have ended; then nothing is held."""
        for _ in range(100_000):
            if not self.waiting and not self.running:
                break
            self.tick()
        assert not self.waiting and not self.running
        assert self.bank.snapshot.leases == 0
