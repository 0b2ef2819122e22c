"""What an operator may do with adapters while the model serves: the directory and the bank as one.

Blocking calls, for worker threads: what touches the engine waits for the step thread (at most one
step), `load` also for the disk. Knows no wire format.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from remora_agent.bank.directory import AdapterDirectory, Alias


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


@dataclass(frozen=True)
class BankCapacity:
    max_rank: int
    used_rank: int
    evictable_rank: int
    more_adapters: int  # of the asked rank, evicting what no request uses


class Adapters:
    """The adapters of one ModelRuntime (`runtime.adapters`). Thread-safe."""

    @property
    def directory(self) -> AdapterDirectory:
        """Aliases, use cases and names; reading and swapping there needs no step thread."""
        raise NotImplementedError

    def register(
        self, name: str, revision: str | None, directory: Path, *, set_alias: bool = False
    ) -> AdapterInfo:
        """AdapterDirectory.register, and the alias moved at once when asked."""
        raise NotImplementedError

    def load(self, name: str, revision: str | None = None, *, timeout_s: float = 60) -> AdapterInfo:
        """Brings it into the bank now. Raises NotFound, ArtifactInvalid, AdapterInvalid, Exhausted
        when what is pinned or in use leaves no room, Unavailable after `timeout_s`."""
        raise NotImplementedError

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
        raise NotImplementedError

    def set_alias(self, name: str, revision: str, expected_epoch: int | None = None) -> Alias:
        """Requests from now on get the new bytes, running ones finish on the old. Raises NotFound,
        Conflict."""
        raise NotImplementedError

    def pin(self, name: str, revision: str | None = None, *, pinned: bool = True) -> AdapterInfo:
        """A pinned adapter is loaded soon and never evicted. Raises NotFound, Refused when the
        largest other known adapter would no longer fit beside the pinned ones."""
        raise NotImplementedError

    def info(self, name: str, revision: str | None = None) -> AdapterInfo:
        """Raises NotFound."""
        raise NotImplementedError

    def list(self) -> tuple[AdapterInfo, ...]:
        """Every registered revision, sorted by name and revision."""
        raise NotImplementedError

    def capacity(self, rank: int) -> BankCapacity:
        """Raises RequestInvalid for a rank below 1."""
        raise NotImplementedError
