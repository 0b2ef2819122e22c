"""What an operator may do with adapters while the model serves: the directory and the bank as one.

Blocking calls, for worker threads: what touches the engine waits for the step thread (at most one
step), `load` also for the disk. Knows no wire format.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from remora_agent.bank.bank import Bank
from remora_agent.bank.counters import BankSnapshot
from remora_agent.bank.directory import AdapterDirectory, Alias, Registered
from remora_agent.bank.policy import BankCapacity, Size, more_that_fit
from remora_agent.runtime.step_loop import StepLoop, wait_for
from remora_agent.runtime.stepper import Stepper
from remora_contract.errors import RequestInvalid

# For what waits for one step of the engine only.
CALL_TIMEOUT_S = 60.0


class Tier(Enum):
    """Where an adapter's weights are, the fastest place counting."""

    DISK = "disk"
    HOST = "host"
    BANK = "bank"


class UnloadMode(Enum):
    GRACEFUL = "graceful"  # leaves when its last request ends; new requests wait and load it anew
    CANCEL = "cancel"  # cancels its requests, running and waiting
    REFUSE_IF_BUSY = "refuse_if_busy"


@dataclass(frozen=True)
class AdapterInfo:
    name: str
    revision: str
    digest: str
    tier: Tier
    rank: int
    bank_bytes: int  # 0 while not in the bank
    pinned: bool
    leases: int  # running requests that use it
    draining: bool
    alias_target: bool
    invocation_tokens: tuple[int, ...] = ()  # acts from them on; empty: always


class Adapters:
    """The adapters of one ModelRuntime (`runtime.adapters`). Thread-safe."""

    def __init__(
        self,
        directory: AdapterDirectory,
        bank: Bank,
        stepper: Stepper,
        loop: StepLoop,
        bytes_of: Callable[[int], int],
    ) -> None:
        """`bytes_of` a rank: what an adapter of it on all that the bundle adapts takes there."""
        self._directory = directory
        self._bank = bank
        self._stepper = stepper
        self._loop = loop
        self._bytes_of = bytes_of

    @property
    def directory(self) -> AdapterDirectory:
        """Aliases, use cases and names; reading and swapping there needs no step thread."""
        return self._directory

    def register(
        self, name: str, revision: str | None, directory: Path, *, set_alias: bool = False
    ) -> AdapterInfo:
        """As AdapterDirectory.register."""
        record = self._directory.register(name, revision, directory, set_alias=set_alias)
        return self._info(record)

    def load(self, name: str, revision: str | None = None, *, timeout_s: float = 60) -> AdapterInfo:
        """Brings it into the bank now. Raises NotFound, ArtifactInvalid, AdapterInvalid, Exhausted
        when what is pinned or in use leaves no room, Unavailable after `timeout_s`."""
        record = self._directory.resolve(name, revision)
        done: Future[None] = Future()
        self._bank.read_ahead(record)
        # What runs of nobody leaves for it: Stepper.step.
        self._loop.call(lambda: self._bank.preload(record, done), timeout_s)
        wait_for(done, timeout_s)
        return self._info(record)

    def unload(
        self,
        name: str,
        revision: str | None = None,
        mode: UnloadMode = UnloadMode.GRACEFUL,
        *,
        forget: bool = False,
    ) -> AdapterInfo:
        """Takes it out of the bank and host memory. Does not wait for running requests: the answer
        says `draining`. Raises NotFound, Refused when busy (REFUSE_IF_BUSY) or pinned, Conflict
        when it may not be forgotten."""
        record = self._directory.resolve(name, revision)

        def on_step_thread() -> None:
            self._stepper.end_spare()  # nobody's work is no reason to refuse or to wait
            self._bank.check_unload(record, refuse_if_busy=mode is UnloadMode.REFUSE_IF_BUSY)
            if forget:
                self._directory.forget(record.name, record.revision)
            if mode is UnloadMode.CANCEL:
                self._stepper.cancel_using(record.digest)
            self._bank.unload(record)

        self._loop.call(on_step_thread, CALL_TIMEOUT_S)
        return self._info(record)

    def set_alias(self, name: str, revision: str, expected_epoch: int | None = None) -> Alias:
        """Requests from now on get the new bytes, running ones finish on the old. Raises NotFound,
        Conflict."""
        return self._directory.set_alias(name, revision, expected_epoch)

    def pin(self, name: str, revision: str | None = None, *, pinned: bool = True) -> AdapterInfo:
        """A pinned adapter is loaded and never evicted. Raises NotFound, Refused when the largest
        other known adapter would no longer fit beside the pinned ones, and what `load` raises."""
        record = self._directory.resolve(name, revision)
        if pinned:
            self.load(record.name, record.revision)
            others = self._directory.revisions()
            self._loop.call(lambda: self._bank.pin(record, others), CALL_TIMEOUT_S)
        else:
            self._loop.call(lambda: self._bank.unpin(record.digest), CALL_TIMEOUT_S)
        return self._info(record)

    def info(self, name: str, revision: str | None = None) -> AdapterInfo:
        """Raises NotFound."""
        return self._info(self._directory.resolve(name, revision))

    def list(self) -> tuple[AdapterInfo, ...]:
        """Every registered revision, sorted by name and revision."""
        snapshot = self._bank.snapshot
        return tuple(self._describe(r, snapshot) for r in self._directory.revisions())

    def capacity(self, rank: int) -> BankCapacity:
        """How many more adapters of `rank`, on every projection, fit beside what is leased or
        pinned. Raises RequestInvalid for a rank below 1."""
        if rank < 1:
            raise RequestInvalid(f"rank must be at least 1, not {rank}")
        snapshot = self._bank.snapshot
        one = Size(rank, self._bytes_of(rank))
        return BankCapacity(
            limits=snapshot.limits,
            used=snapshot.used,
            evictable_rank=sum(p.size.rank for p in snapshot.places if p.idle),
            more_adapters=more_that_fit(snapshot.places, snapshot.limits, one),
            host_max_bytes=snapshot.host_max_bytes,
            host_used_bytes=snapshot.host_bytes,
        )

    def _info(self, record: Registered) -> AdapterInfo:
        return self._describe(record, self._bank.snapshot)

    def _describe(self, record: Registered, snapshot: BankSnapshot) -> AdapterInfo:
        place = snapshot.place(record.digest)
        below = Tier.HOST if record.digest in snapshot.in_host else Tier.DISK
        return AdapterInfo(
            name=record.name,
            revision=record.revision,
            digest=record.digest,
            tier=below if place is None else Tier.BANK,
            rank=record.rank,
            bank_bytes=0 if place is None else place.size.bytes,
            pinned=record.digest in snapshot.pinned,
            leases=0 if place is None else place.leases,
            draining=place is not None and place.draining,
            alias_target=self._directory.is_alias_target(record),
            invocation_tokens=record.invocation_tokens,
        )
