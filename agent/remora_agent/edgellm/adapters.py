"""What an operator may do with the adapters of an `EdgeModel`: as `runtime.adapters.Adapters`, but
an adapter that comes in costs a restart of the runtime, while requests wait.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from remora_agent.bank.directory import AdapterDirectory, Alias, Registered
from remora_agent.bank.policy import BankCapacity, Size, total
from remora_agent.edgellm.convert import refuse_adapter
from remora_agent.edgellm.loaded import LoadedAdapters
from remora_agent.runtime.adapters import AdapterInfo, Tier, UnloadMode
from remora_contract.errors import Refused, RequestInvalid


class EdgeAdapters:
    """Thread-safe."""

    def __init__(
        self,
        directory: AdapterDirectory,
        loaded: LoadedAdapters,
        bring_in: Callable[[Registered, float], None],
        cancel_using: Callable[[str], None],
        bytes_of: Callable[[int], int],
    ) -> None:
        """`bring_in` restarts the runtime with it and waits; `cancel_using` a digest ends its
        requests; `bytes_of` a rank: what an adapter of it takes at most."""
        self._directory = directory
        self._loaded = loaded
        self._bring_in = bring_in
        self._cancel_using = cancel_using
        self._bytes_of = bytes_of

    @property
    def directory(self) -> AdapterDirectory:
        return self._directory

    def register(
        self, name: str, revision: str | None, directory: Path, *, set_alias: bool = False
    ) -> AdapterInfo:
        """Raises Unsupported for an adapter that Edge-LLM has no place for, and as
        AdapterDirectory.register."""
        refuse_adapter(name, directory)
        record = self._directory.register(name, revision, directory, set_alias=set_alias)
        return self._info(record)

    def load(self, name: str, revision: str | None = None, *, timeout_s: float = 60) -> AdapterInfo:
        """Raises NotFound, ArtifactInvalid, AdapterInvalid, Exhausted, EngineFault where the
        runtime does not open with it (it is then opened without), Unavailable after `timeout_s`."""
        record = self._directory.resolve(name, revision)
        if not self._loaded.holds(record.digest):
            self._bring_in(record, timeout_s)
        return self._info(record)

    def unload(
        self,
        name: str,
        revision: str | None = None,
        mode: UnloadMode = UnloadMode.GRACEFUL,
        *,
        forget: bool = False,
    ) -> AdapterInfo:
        """It leaves the runtime's memory with the next restart. Raises NotFound, Refused when busy
        (REFUSE_IF_BUSY) or pinned, Conflict when it may not be forgotten."""
        record = self._directory.resolve(name, revision)
        with self._loaded.lock:
            if record.digest in self._loaded.pinned:
                raise Refused(f"adapter {name} is pinned; unpin it first")
            if mode is UnloadMode.REFUSE_IF_BUSY and self._loaded.leases.get(record.digest):
                raise Refused(f"adapter {name} is in use; try again later")
            if forget:
                self._directory.forget(record.name, record.revision)
            files = {d: f for d, f in self._loaded.files.items() if d != record.digest}
            busy = self._loaded.leases.get(record.digest, 0)
            if not busy:
                self._loaded.became(files)
        if busy and mode is UnloadMode.CANCEL:
            self._cancel_using(record.digest)
        return self._info(record)

    def set_alias(self, name: str, revision: str, expected_epoch: int | None = None) -> Alias:
        return self._directory.set_alias(name, revision, expected_epoch)

    def pin(self, name: str, revision: str | None = None, *, pinned: bool = True) -> AdapterInfo:
        record = self._directory.resolve(name, revision)
        if pinned:
            self.load(record.name, record.revision)
            self._loaded.pin(record)
        else:
            self._loaded.unpin(record.digest)
        return self._info(record)

    def info(self, name: str, revision: str | None = None) -> AdapterInfo:
        return self._info(self._directory.resolve(name, revision))

    def list(self) -> tuple[AdapterInfo, ...]:
        return tuple(map(self._info, self._directory.revisions()))

    def capacity(self, rank: int) -> BankCapacity:
        if rank < 1:
            raise RequestInvalid(f"rank must be at least 1, not {rank}")
        loaded = self._loaded
        with loaded.lock:
            sizes = dict(loaded.sizes)
            idle = [d for d in sizes if d not in loaded.pinned and not loaded.leases.get(d)]
        held = total(s for d, s in sizes.items() if d not in idle)
        one = Size(rank, self._bytes_of(rank))
        return BankCapacity(
            limits=loaded.limits,
            used=total(sizes.values()),
            evictable_rank=sum(sizes[d].rank for d in idle),
            more_adapters=_more(loaded, held, one),
            host_max_bytes=0,
            host_used_bytes=0,
        )

    def _info(self, record: Registered) -> AdapterInfo:
        loaded = self._loaded
        held = loaded.holds(record.digest)
        return AdapterInfo(
            name=record.name,
            revision=record.revision,
            digest=record.digest,
            tier=Tier.BANK if held else Tier.DISK,
            rank=record.rank,
            bank_bytes=record.bank_bytes if held else 0,
            pinned=record.digest in loaded.pinned,
            leases=loaded.leases.get(record.digest, 0),
            draining=False,
            alias_target=self._directory.is_alias_target(record),
        )


def _more(loaded: LoadedAdapters, held: Size, one: Size) -> int:
    """How many of `one` fit beside `held`."""
    limits = loaded.limits
    by_rank = (limits.rank - held.rank) // one.rank
    by_bytes = by_rank if limits.bytes is None else (limits.bytes - held.bytes) // max(one.bytes, 1)
    return max(0, min(by_rank, by_bytes))
