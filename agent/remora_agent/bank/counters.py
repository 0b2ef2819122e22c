"""What the bank shows of itself. Frozen data; any thread may read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from remora_agent.bank.policy import BankLimits, Place, Size, Sizes, total


@dataclass(frozen=True)
class BankCounters:
    """Since the start."""

    hits: int = 0  # adapters found resident at a lease
    loads: int = 0  # adapters made resident, from host memory
    load_s: float = 0.0  # all of them, evictions included: the step thread's time
    reads: int = 0  # adapters read from disk into host memory
    read_s: float = 0.0  # all of them, beside the step thread
    read_failures: int = 0
    evictions: int = 0  # to make room
    turns: int = 0  # adapters that gave way to a request that had waited for too long
    compositions: int = 0  # leases of several adapters, or of one with a weight other than 1
    last_swap_s: float = 0.0  # of the last making resident, evictions included


@dataclass(frozen=True)
class BankSnapshot:
    """The bank as it was after its last change."""

    limits: BankLimits
    places: tuple[Place, ...] = ()
    pinned: Sizes = field(default_factory=dict)  # resident or not
    in_host: frozenset[str] = frozenset()
    host_bytes: int = 0  # of the weights in host memory
    host_max_bytes: int = 0
    leases: int = 0
    counters: BankCounters = field(default_factory=BankCounters)

    @property
    def used(self) -> Size:
        return total(p.size for p in self.places)

    def place(self, digest: str) -> Place | None:
        return next((p for p in self.places if p.digest == digest), None)

    def metrics(self) -> Mapping[str, float]:
        """Counters and what is resident now, by the names that a runtime's metrics have."""
        c, used = self.counters, self.used
        return {
            "adapter_hits": float(c.hits),
            "adapter_loads": float(c.loads),
            "adapter_load_s": c.load_s,
            "adapter_reads": float(c.reads),
            "adapter_read_s": c.read_s,
            "adapter_read_failures": float(c.read_failures),
            "adapter_evictions": float(c.evictions),
            "adapter_turns": float(c.turns),
            "compositions": float(c.compositions),
            "last_swap_s": c.last_swap_s,
            "adapters_in_bank": float(len(self.places)),
            "adapters_in_host": float(len(self.in_host)),
            "adapters_pinned": float(len(self.pinned)),
            "adapter_leases": float(sum(p.leases for p in self.places)),
            "bank_rank": float(used.rank),
            "bank_bytes": float(used.bytes),
            "adapter_host_bytes": float(self.host_bytes),
        }
