"""Which adapters are resident in the engine, and who uses them.

Tiers DISK -> HOST (HostCache) -> BANK (engine handles). One thread, the step thread, calls
everything but `snapshot`. The decisions are `policy`'s; this module carries them out and counts.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from remora_agent.bank.directory import Registered
from remora_agent.bank.host import HostCache
from remora_agent.bank.loader import Loads
from remora_agent.bank.policy import (
    Fits,
    NoRoom,
    Place,
    make_room,
    never_fits,
    plan_loads,
)
from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Engine, Mix, MixEntry
from remora_contract.digests import short
from remora_contract.errors import Exhausted, InternalFault, Refused, RemoraError

log = logging.getLogger(__name__)


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
class BankCounters:
    hits: int = 0  # adapters found resident at a lease
    loads: int = 0  # adapters made resident
    evictions: int = 0
    compositions: int = 0  # leases of several adapters, or of one with a weight other than 1
    last_swap_s: float = 0.0  # of the last making resident, evictions included


@dataclass(frozen=True)
class BankSnapshot:
    """The bank as it was after its last change; any thread may read it."""

    max_rank: int
    places: tuple[Place, ...] = ()
    pinned: Mapping[str, int] = field(default_factory=dict)  # digest -> rank, resident or not
    in_host: frozenset[str] = frozenset()
    leases: int = 0
    counters: BankCounters = field(default_factory=BankCounters)

    def place(self, digest: str) -> Place | None:
        return next((p for p in self.places if p.digest == digest), None)


@dataclass(frozen=True)
class _Resident:
    handle: int
    place: Place


class Bank:
    def __init__(
        self, engine: Engine, host: HostCache, loader: Loads, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._host = host
        self._loader = loader
        self._clock = clock
        self._residents: dict[str, _Resident] = {}
        self._leases: dict[int, Lease] = {}
        self._pinned: dict[str, int] = {}
        self._keep: frozenset[str] = frozenset()
        self._failures: dict[str, RemoraError] = {}
        self._preloads: dict[str, tuple[Registered, list[Future[None]]]] = {}
        self._numbers = itertools.count(1)
        self._counters = BankCounters()
        self._snapshot = BankSnapshot(engine.limits.max_bank_rank)

    @property
    def snapshot(self) -> BankSnapshot:
        return self._snapshot

    # -- requests ---------------------------------------------------------------------------

    def acquire(self, wanted: Sequence[Wanted]) -> Lease | None:
        """All adapters of a request made resident and leased, or None while that must wait.

        Raises what the engine refuses an adapter with; Exhausted when it can never fit beside
        what is pinned now. Nothing is leased then.
        """
        if not self._ready(wanted):
            return None
        ranks = {w.adapter.digest: w.adapter.rank for w in wanted}
        room = make_room(self._places(), ranks, self._engine.limits.max_bank_rank)
        if isinstance(room, NoRoom):
            self.check_fits(wanted)
            return None
        missing = [d for d in ranks if d not in self._residents]
        self._make_resident(room, missing)
        self._counters = replace(
            self._counters, hits=self._counters.hits + len(ranks) - len(missing)
        )
        return self._lease(wanted)

    def release(self, lease: Lease) -> None:
        """Raises InternalFault for a lease that was released before."""
        if self._leases.pop(lease.number, None) is None:
            raise InternalFault(f"lease {lease.number} was released twice")
        for digest in lease.digests:
            resident = self._change(digest, leases=-1)
            if resident.place.draining and not resident.place.leases:
                self._remove(digest)
                self._host.drop(digest)
        self._publish()

    def check_fits(self, wanted: Sequence[Wanted]) -> None:
        """Raises Exhausted when waiting would never help. Any thread."""
        ranks = {w.adapter.digest: w.adapter.rank for w in wanted}
        snapshot = self._snapshot
        together = never_fits(snapshot.pinned, ranks, snapshot.max_rank)
        if together is not None:
            raise Exhausted(
                f"these adapters need rank {sum(ranks.values())}, which with what is pinned makes "
                f"{together}; the bank holds {snapshot.max_rank}. Use fewer or smaller adapters, "
                "unpin, or export with a larger --max-bank-rank"
            )
        size = sum({w.adapter.digest: w.adapter.bytes for w in wanted}.values())
        if size > self._host.capacity_bytes:
            raise Exhausted(
                f"these adapters have {size} bytes; host memory for adapters is limited to "
                f"{self._host.capacity_bytes}"
            )

    # -- loading ----------------------------------------------------------------------------

    def prefetch(self, waiting: Iterable[Sequence[Wanted]]) -> None:
        """Starts reading what the waiting requests (oldest first) and preloads will need."""
        adapters = {d: adapter for d, (adapter, _) in self._preloads.items()}
        mixes = [{d: a.bytes} for d, a in adapters.items()]
        for wanted in waiting:
            mixes.append({w.adapter.digest: w.adapter.bytes for w in wanted})
            adapters.update({w.adapter.digest: w.adapter for w in wanted})
        load, self._keep = plan_loads(
            mixes, self._residents, self._host.digests(), self._host.capacity_bytes
        )
        for digest in load:
            self._loader.start(adapters[digest])

    def loaded(self, digest: str, result: AdapterWeights | RemoraError) -> None:
        """The loader's answer."""
        self._loader.finished(digest)
        if isinstance(result, RemoraError):
            self._failures[digest] = result
        elif not self._host.put(result, self._keep):
            log.info("adapter.dropped", extra={"digest": digest, "bytes": result.bytes})
        self._publish()

    def take_failures(self) -> Mapping[str, RemoraError]:
        """Adapters that could not be read since the last call; who waits for them fails."""
        failures, self._failures = self._failures, {}
        for digest, error in failures.items():
            _, futures = self._preloads.pop(digest, (None, []))
            for future in futures:
                future.set_exception(error)
        return failures

    def preload(self, adapter: Registered, done: Future[None]) -> None:
        """Makes it resident as soon as it is read; `done` tells when, or why not."""
        self.check_fits([Wanted(adapter, 1.0)])
        self._preloads.setdefault(adapter.digest, (adapter, []))[1].append(done)

    def serve_preloads(self) -> bool:
        """Whether some wait for the disk."""
        for digest, (adapter, futures) in list(self._preloads.items()):
            wanted = [Wanted(adapter, 1.0)]
            if digest not in self._residents and digest not in self._host.digests():
                continue
            del self._preloads[digest]
            try:
                self._preload_now(wanted)
            except RemoraError as e:
                for future in futures:
                    future.set_exception(e)
            else:
                for future in futures:
                    future.set_result(None)
        return bool(self._preloads)

    def fail_preloads(self, error: RemoraError) -> None:
        """Nobody waits for a bank that has ended."""
        for _, futures in self._preloads.values():
            for future in futures:
                future.set_exception(error)
        self._preloads.clear()

    # -- operator ---------------------------------------------------------------------------

    def pin(self, adapter: Registered, others: Iterable[Registered]) -> None:
        """Never evicted from now on. Raises Refused when one of `others`, all that are known,
        could not be resident beside the pinned ones."""
        pinned = {**self._pinned, adapter.digest: adapter.rank}
        left = self._engine.limits.max_bank_rank - sum(pinned.values())
        largest = max((o.rank for o in others if o.digest not in pinned), default=0)
        if left < largest:
            raise Refused(
                f"pinning {adapter.name} (rank {adapter.rank}) would leave rank {left} of the "
                f"bank to others, and the largest of them needs {largest}; unpin another first"
            )
        self._pinned = pinned
        if adapter.digest in self._residents:
            self._change(adapter.digest, draining=False)
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
            self._change(adapter.digest, draining=True)
        else:
            if adapter.digest in self._residents:
                self._remove(adapter.digest)
            self._host.drop(adapter.digest)
        self._publish()

    # -- inside -----------------------------------------------------------------------------

    def _ready(self, wanted: Sequence[Wanted]) -> bool:
        """Whether each is resident, and not on its way out, or could be made so now."""
        in_host = self._host.digests()
        for w in wanted:
            resident = self._residents.get(w.adapter.digest)
            if resident is None and w.adapter.digest not in in_host:
                return False
            if resident is not None and resident.place.draining:
                return False
        return True

    def _leases_of(self, digest: str) -> int:
        resident = self._residents.get(digest)
        return resident.place.leases if resident else 0

    def _lease(self, wanted: Sequence[Wanted]) -> Lease:
        digests = tuple(dict.fromkeys(w.adapter.digest for w in wanted))
        mix = tuple(
            MixEntry(
                self._residents[digest].handle,
                sum(w.weight for w in wanted if w.adapter.digest == digest),
            )
            for digest in digests
        )
        starts = {w.adapter.digest: w.start for w in wanted}  # equal digests start alike
        lease = Lease(next(self._numbers), digests, mix, tuple(starts[d] for d in digests))
        self._leases[lease.number] = lease
        if len(mix) > 1 or any(entry.weight != 1.0 for entry in mix):
            self._counters = replace(self._counters, compositions=self._counters.compositions + 1)
        for digest in digests:
            self._change(digest, leases=1)
        self._publish()
        return lease

    def _preload_now(self, wanted: Sequence[Wanted]) -> None:
        lease = self.acquire(wanted)
        if lease is None:
            raise Exhausted(
                f"adapter {wanted[0].adapter.name} does not fit beside what running requests use; "
                "try again when they have ended",
                retry_after_s=1.0,
            )
        self.release(lease)

    def _make_resident(self, room: Fits, digests: Sequence[str]) -> None:
        if not digests:
            return
        began = self._clock()
        for digest in room.evict:
            self._remove(digest)
        for digest in digests:
            self._add(digest)
        self._counters = replace(
            self._counters,
            loads=self._counters.loads + len(digests),
            evictions=self._counters.evictions + len(room.evict),
            last_swap_s=self._clock() - began,
        )

    def _add(self, digest: str) -> None:
        weights = self._host.get(digest)
        if weights is None:
            raise InternalFault(f"adapter {short(digest)} left host memory too early")
        handle = self._engine.add_adapter(weights)
        place = Place(digest, weights.rank, weights.bytes, 0, False, False, next(self._numbers))
        self._residents[digest] = _Resident(handle, place)
        log.info("adapter.resident", extra={"digest": digest, "rank": weights.rank})

    def _remove(self, digest: str) -> None:
        resident = self._residents.pop(digest)
        self._engine.remove_adapter(resident.handle)
        log.info("adapter.evicted", extra={"digest": digest})

    def _change(self, digest: str, *, leases: int = 0, draining: bool | None = None) -> _Resident:
        """Adds to the leases; a new lease is a use."""
        old = self._residents[digest]
        place = replace(
            old.place,
            leases=old.place.leases + leases,
            draining=old.place.draining if draining is None else draining,
            used=next(self._numbers) if leases > 0 else old.place.used,
        )
        self._residents[digest] = changed = _Resident(old.handle, place)
        return changed

    def _places(self) -> tuple[Place, ...]:
        return tuple(
            replace(r.place, pinned=r.place.digest in self._pinned)
            for r in self._residents.values()
        )

    def _publish(self) -> None:
        self._snapshot = BankSnapshot(
            self._engine.limits.max_bank_rank,
            self._places(),
            dict(self._pinned),
            self._host.digests(),
            len(self._leases),
            self._counters,
        )
