"""Which adapters the runtime was opened with, and which it is to be opened with next. Pure but for
the converted files that it names; the step from one to the other is `EdgeModel`'s.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from remora_agent.bank.directory import Registered
from remora_agent.bank.policy import BankLimits, Size, total
from remora_contract.digests import hex_of
from remora_contract.errors import Exhausted


def key_of(digest: str) -> str:
    """The name that the runtime knows an adapter by: two revisions of one name are two."""
    return hex_of(digest)


@dataclass
class LoadedAdapters:
    """By digest, the least recently used first. Thread-safe."""

    limits: BankLimits
    files: dict[str, Path] = field(default_factory=dict)
    sizes: dict[str, Size] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    leases: dict[str, int] = field(default_factory=dict)  # running and waiting requests
    seen: set[str] = field(default_factory=set)  # that ever came in, or were tried
    lock: threading.RLock = field(default_factory=threading.RLock)

    def holds(self, digest: str) -> bool:
        with self.lock:
            return digest in self.files

    def with_one_more(
        self, files: dict[str, Path], record: Registered, file: Path
    ) -> dict[str, Path]:
        """`files`, and it too, without those that leave for it. Raises Exhausted when what is
        pinned or in use leaves no room."""
        with self.lock:
            self.sizes[record.digest] = record.size
            kept = {d: f for d, f in files.items() if d != record.digest}
            while not self.limits.hold(total([*(self.sizes[d] for d in kept), record.size])):
                idle = [d for d in kept if d not in self.pinned and not self.leases.get(d)]
                if not idle:
                    raise Exhausted(
                        f"adapter {record.name}: what is pinned or in use leaves no room for it; "
                        "unpin one or try again later"
                    )
                del kept[idle[0]]
            return {**kept, record.digest: file}

    def became(self, files: dict[str, Path]) -> None:
        """The runtime is open with these."""
        with self.lock:
            self.files = dict(files)
            self.sizes = {d: s for d, s in self.sizes.items() if d in files}
            self.pinned &= set(files)

    def pin(self, record: Registered) -> None:
        """Raises Exhausted where another one took its place since it came in."""
        with self.lock:
            if record.digest not in self.files:
                raise Exhausted(
                    f"adapter {record.name} left for others before it was pinned; try again"
                )
            self.pinned.add(record.digest)

    def unpin(self, digest: str) -> None:
        with self.lock:
            self.pinned.discard(digest)

    def lease(self, digest: str, by: int) -> None:
        with self.lock:
            left = self.leases.get(digest, 0) + by
            self.leases[digest] = left
            if not left:
                del self.leases[digest]
            if digest in self.files:
                self.files[digest] = self.files.pop(digest)  # the last used is the last

    def metrics(self) -> dict[str, float]:
        with self.lock:
            return {"adapters_in_bank": float(len(self.files))}
