"""Which adapters are resident in the engine, and who uses them.

Tiers DISK -> HOST (HostCache) -> BANK (engine handles). One thread, the step thread, calls
everything but `snapshot`, `check_fits` and `read_ahead`. The decisions are those of `admission` and
`reading`; this module carries them out and counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from remora_agent.bank.admission import Admission
from remora_agent.bank.counters import BankCounters, BankSnapshot
from remora_agent.bank.directory import Registered
from remora_agent.bank.host import HostCache
from remora_agent.bank.intake import Intake
from remora_agent.bank.loader import Loads
from remora_agent.bank.policy import BankLimits, Fits, NoRoom, Place, Size, never_fits, total
from remora_agent.bank.preloads import Preloads
from remora_agent.bank.residents import Residents
from remora_agent.bank.turns import Key
from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Engine, Mix, MixEntry
from remora_contract.digests import short
from remora_contract.errors import Exhausted, InternalFault, Refused, RemoraError


@dataclass(frozen=True)
class Wanted:
    """An adapter of a request, resolved."""

    adapter: Registered
    weight: float
    start: int | None = 0  # the first token it acts on; None: it is not invoked and never acts


@dataclass(frozen=True)
class Lease:
    """A request's hold on its adapters, released exactly once."""

    number: int
    digests: tuple[str, ...]
    mix: Mix
    starts: tuple[int | None, ...]  # of each entry: the first token it acts on; None: never

    def mix_at(self, position: int) -> Mix:
        """What the row's token at `position` goes through."""
        pairs = zip(self.mix, self.starts, strict=True)
        return tuple(entry for entry, start in pairs if start is not None and start <= position)


@dataclass(frozen=True)
class BankOptions:
    """`rank` and `bytes` bound all resident adapters together, beside what the engine takes; None:
    as the engine does. Who was refused room for `turn_s` seconds gets that of others."""

    rank: int | None = None
    bytes: int | None = None
    turn_s: float = 2.0

    def limits(self, engine_rank: int) -> BankLimits:
        rank = engine_rank if self.rank is None else min(self.rank, engine_rank)
        return BankLimits(rank, self.bytes)


class Bank:
    def __init__(
        self,
        engine: Engine,
        host: HostCache,
        loader: Loads,
        clock: Callable[[], float],
        options: BankOptions | None = None,
    ) -> None:
        options = options or BankOptions()
        self._limits = options.limits(engine.limits.max_bank_rank)
        self._host = host
        self._intake = Intake(host, loader)
        self._clock = clock
        self._residents = Residents(engine)
        self._leases: dict[int, Lease] = {}
        self._pinned: dict[str, Size] = {}
        self._preloads = Preloads()
        self._numbers = itertools.count(1)
        self._counters = BankCounters()
        self._admission = Admission(
            self._limits,
            options.turn_s,
            clock,
            self._places,
            self._ready,
            lambda count: self._count(turns=count),
        )
        self._snapshot = BankSnapshot(self._limits, host_max_bytes=host.capacity_bytes)

    @property
    def snapshot(self) -> BankSnapshot:
        return self._snapshot

    # -- requests ---------------------------------------------------------------------------

    def acquire(self, wanted: Sequence[Wanted]) -> Lease | None:
        """All adapters of a request made resident and leased, or None while that must wait.

        Raises what the engine refuses an adapter with; Exhausted when it can never fit beside
        what is pinned now. Nothing is leased then.
        """
        self._residents.check_not_refused(w.adapter.digest for w in wanted)
        sizes = _sizes(wanted)
        if not self._ready(sizes):
            return None
        room = self._admission.room(sizes)
        if isinstance(room, NoRoom):
            self.check_fits(wanted)
            self._admission.refused(sizes)
            return None
        missing = [d for d in sizes if d not in self._residents]
        self._let_in(room, missing)
        self._admission.served(sizes)
        self._count(hits=len(sizes) - len(missing))
        return self._lease(wanted)

    def acquire_resident(self, wanted: Sequence[Wanted]) -> Lease | None:
        """A lease for what nobody waits for: of adapters that are resident, or None. Nobody makes
        room for it, it counts nowhere, and an adapter is no more in use than before."""
        places = [self._residents.place(w.adapter.digest) for w in wanted]
        if any(place is None or place.draining for place in places):
            return None
        return self._lease(wanted, is_use=False)

    def release(self, lease: Lease) -> None:
        """Raises InternalFault for a lease that was released before."""
        if self._leases.pop(lease.number, None) is None:
            raise InternalFault(f"lease {lease.number} was released twice")
        for digest in lease.digests:
            place = self._residents.let_go(digest)
            if place.draining and not place.leases:
                self._residents.remove(digest)
                self._intake.drop(digest)
        self._publish()

    def check_fits(self, wanted: Sequence[Wanted]) -> None:
        """Raises Exhausted when waiting would never help. Any thread."""
        sizes, snapshot = _sizes(wanted), self._snapshot
        together = never_fits(snapshot.pinned, sizes, snapshot.limits)
        if together is not None:
            asked = total(sizes.values())
            raise Exhausted(
                f"these adapters need {_told(asked)}, which with what is pinned makes "
                f"{_told(together)}; the bank holds {_told(snapshot.limits)}. Use fewer or smaller "
                "adapters, unpin, raise the limits of [adapters] or export with a larger "
                "--max-bank-rank"
            )
        size = sum({w.adapter.digest: w.adapter.bank_bytes for w in wanted}.values())
        if size > self._host.capacity_bytes:
            raise Exhausted(
                f"these adapters have {size} bytes; host memory for adapters is limited to "
                f"{self._host.capacity_bytes}: use fewer or raise host_bytes"
            )

    # -- loading ----------------------------------------------------------------------------

    def prefetch(self, waiting: Iterable[Sequence[Wanted]]) -> None:
        """Starts reading what the waiting requests (first come first) and preloads will need.
        Belongs to every step: what nobody waits for any more is forgotten here."""
        mixes: dict[Key, Sequence[Wanted]] = {}
        for wanted in waiting:
            mixes.setdefault(frozenset(w.adapter.digest for w in wanted), wanted)
        self._admission.hear(mixes, self._residents.digests())
        preloads = [(a,) for a in self._preloads.adapters()]
        requests = [tuple(w.adapter for w in wanted) for wanted in mixes.values()]
        self._intake.prefetch([*preloads, *requests], self._residents.digests())

    def loaded(
        self, digest: str, result: AdapterWeights | RemoraError, seconds: float = 0.0
    ) -> None:
        """The loader's answer, and how long it took."""
        self._intake.loaded(digest, result)
        if isinstance(result, RemoraError):
            self._count(read_failures=1)
        else:
            self._count(reads=1, read_s=seconds)
        self._publish()

    def take_failures(self) -> Mapping[str, RemoraError]:
        """Adapters that could not be read since the last call; who waits for them fails."""
        failures = self._intake.take_failures()
        for digest, error in failures.items():
            self._preloads.settle(digest, error)
        return failures

    def read_ahead(self, adapter: Registered) -> None:
        """Starts reading what is going to be preloaded, while the step thread computes. Any thread.
        Raises Exhausted when it can never fit."""
        self.check_fits([Wanted(adapter, 1.0)])
        snapshot = self._snapshot
        if snapshot.place(adapter.digest) is None and adapter.digest not in snapshot.in_host:
            self._intake.read_ahead(adapter)

    def preload(self, adapter: Registered, done: Future[None]) -> None:
        """Makes it resident as soon as it is read; `done` tells when, or why not."""
        self.check_fits([Wanted(adapter, 1.0)])
        self._preloads.add(adapter, done)

    def serve_preloads(self) -> bool:
        """Whether some wait for the disk."""
        for adapter in self._preloads.adapters():
            if not self._in_reach(adapter.digest):
                continue
            try:
                self._preload_now(adapter)
            except RemoraError as e:
                self._preloads.settle(adapter.digest, e)
            else:
                self._preloads.settle(adapter.digest)
        return bool(self._preloads)

    @property
    def preloading(self) -> bool:
        """Whether somebody waits for a preload."""
        return bool(self._preloads)

    def close(self, error: RemoraError) -> None:
        """Frees everything, bank and host memory; who waits for a preload gets `error`. All leases
        have been released."""
        self._preloads.settle_all(error)
        for digest in tuple(self._residents.digests()):
            self._residents.remove(digest)
        self._host.clear()
        self._pinned.clear()
        self._admission.hear((), ())
        self._publish()

    def fail_preloads(self, error: RemoraError) -> None:
        """Nobody waits for a bank whose thread has died."""
        self._preloads.settle_all(error)

    # -- operator ---------------------------------------------------------------------------

    def pin(self, adapter: Registered, others: Iterable[Registered]) -> None:
        """Never evicted from now on. Raises Refused when there would be no place left for another
        like it, or for one of `others`, all that are known, that is not pinned."""
        if adapter.digest in self._pinned:
            return
        pinned = {**self._pinned, adapter.digest: adapter.size}
        fixed = total(pinned.values())
        movable = [adapter, *(o for o in others if o.digest not in pinned)]
        for other in sorted(movable, key=lambda o: o.rank, reverse=True):
            if not self._limits.hold(fixed + other.size):
                raise Refused(
                    f"pinning {adapter.name} would make {_told(fixed)} of {_told(self._limits)} "
                    f"pinned and leave no place for an adapter like {other.name}, which needs "
                    f"{_told(other.size)}; unpin another first"
                )
        self._pinned = pinned
        if adapter.digest in self._residents:
            self._residents.drain(adapter.digest, draining=False)
        self._publish()

    def unpin(self, digest: str) -> None:
        self._pinned.pop(digest, None)
        self._publish()

    def check_unload(self, adapter: Registered, *, refuse_if_busy: bool) -> None:
        """Raises Refused for a pinned adapter, or a busy one when asked."""
        if adapter.digest in self._pinned:
            raise Refused(f"adapter {adapter.name} is pinned; unpin it first")
        leases = self._leases_of(adapter.digest)
        if leases and refuse_if_busy:
            raise Refused(f"adapter {adapter.name} is used by {leases} running request(s)")

    def unload(self, adapter: Registered) -> None:
        """Out of bank and host memory: at once, or at its last release. Raises Refused."""
        self.check_unload(adapter, refuse_if_busy=False)
        if self._leases_of(adapter.digest):
            self._residents.drain(adapter.digest, draining=True)
        else:
            if adapter.digest in self._residents:
                self._residents.remove(adapter.digest)
            self._intake.drop(adapter.digest)
        self._publish()

    # -- inside -----------------------------------------------------------------------------

    def _in_reach(self, digest: str) -> bool:
        """Resident, and not on its way out, or in host memory."""
        place = self._residents.place(digest)
        return not place.draining if place is not None else digest in self._host

    def _ready(self, digests: Iterable[str]) -> bool:
        return all(self._in_reach(d) for d in digests)

    def _places(self) -> tuple[Place, ...]:
        return self._residents.places(self._pinned)

    def _leases_of(self, digest: str) -> int:
        place = self._residents.place(digest)
        return place.leases if place is not None else 0

    def _lease(self, wanted: Sequence[Wanted], *, is_use: bool = True) -> Lease:
        digests = tuple(dict.fromkeys(w.adapter.digest for w in wanted))
        mix = tuple(
            MixEntry(
                self._residents.handle(digest),
                sum(w.weight for w in wanted if w.adapter.digest == digest),
            )
            for digest in digests
        )
        starts = {w.adapter.digest: w.start for w in wanted}  # equal digests start alike
        lease = Lease(next(self._numbers), digests, mix, tuple(starts[d] for d in digests))
        self._leases[lease.number] = lease
        is_composed = len(mix) > 1 or any(entry.weight != 1.0 for entry in mix)
        self._count(compositions=is_composed and is_use)
        for digest in digests:
            self._residents.hold(digest, is_use=is_use)
        self._publish()
        return lease

    def _preload_now(self, adapter: Registered) -> None:
        if adapter.digest in self._residents:
            return
        room = self._admission.room_for_operator({adapter.digest: adapter.size})
        if isinstance(room, NoRoom):
            self.check_fits([Wanted(adapter, 1.0)])
            raise Exhausted(
                f"adapter {adapter.name} does not fit beside what running requests use; "
                "try again when they have ended",
                retry_after_s=1.0,
            )
        self._let_in(room, [adapter.digest])
        self._publish()

    def _let_in(self, room: Fits, digests: Sequence[str]) -> None:
        """Evicts and makes resident. Raises what the engine refuses an adapter with."""
        if not digests:
            return
        began, added = self._clock(), 0
        try:
            for digest in room.evict:
                self._residents.remove(digest)
            for digest in digests:
                self._add(digest, began)
                added += 1
        finally:
            seconds = self._clock() - began
            self._count(loads=added, load_s=seconds, evictions=len(room.evict))
            self._counters = replace(self._counters, last_swap_s=seconds)
            self._publish()

    def _add(self, digest: str, now: float) -> None:
        weights = self._host.get(digest)
        if weights is None:
            raise InternalFault(f"adapter {short(digest)} left host memory too early")
        self._residents.add(weights, now)

    def _count(self, **more: float) -> None:
        changed = {name: getattr(self._counters, name) + n for name, n in more.items() if n}
        if changed:
            self._counters = replace(self._counters, **changed)

    def _publish(self) -> None:
        self._admission.changed()
        self._snapshot = BankSnapshot(
            self._limits,
            self._places(),
            dict(self._pinned),
            self._host.digests(),
            self._host.bytes,
            self._host.capacity_bytes,
            len(self._leases),
            self._counters,
        )


def _sizes(wanted: Iterable[Wanted]) -> dict[str, Size]:
    return {w.adapter.digest: w.adapter.size for w in wanted}


def _told(size: Size | BankLimits) -> str:
    if size.bytes is None:
        return f"rank {size.rank}"
    return f"rank {size.rank} and {size.bytes} bytes"
