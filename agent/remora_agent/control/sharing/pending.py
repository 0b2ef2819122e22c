"""The engine that this device holds the lease for: written down before it is built, until it is
uploaded or given up. `next_step` is the whole decision; pure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from remora_agent.control.activation import Record
from remora_agent.control.phase import RESUMABLE
from remora_agent.control.state import Database
from remora_contract.device_phase import Phase
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.strict import loads

_FACT = "shared_engine"
_PROVEN = frozenset({Phase.WAIT_WINDOW, Phase.SWITCHING, Phase.SOAKING, Phase.COMMITTED})
# Of a device, these would happen to any other of its class.
_MODEL_ERRORS = frozenset(
    {"EngineFault", "Unsupported", "NoFusedKernel", "ArtifactInvalid", "DocumentInvalid"}
)


@dataclass(frozen=True)
class Pending:
    generation: int
    bundle_digest: str
    key_json: str
    lease_s: float
    proven: bool = False  # it has answered the golden prompts here

    @property
    def key_digest(self) -> str:
        return digest_bytes(self.key_json.encode())


@dataclass(frozen=True)
class Renew:
    pass


@dataclass(frozen=True)
class Upload:
    pass


@dataclass(frozen=True)
class GiveUp:
    blames_model: bool
    why: str


Step = Renew | Upload | GiveUp


def next_step(pending: Pending, record: Record | None) -> Step:
    """What the lease's holder does now; `record` is what the device is at."""
    if pending.proven:
        return Upload()
    if record is None or record.desired.generation != pending.generation:
        return GiveUp(False, "the device was assigned something else before it was built")
    if record.phase in _PROVEN:
        return Upload()
    if record.phase in RESUMABLE:
        return Renew()
    why = f"{record.error_code}: {record.error_message}" if record.error_code else "it went back"
    return GiveUp(record.error_code in _MODEL_ERRORS, why)


class PendingStore:
    """In state.db. Thread-safe; `on_change` hears of what was begun."""

    def __init__(self, database: Database, on_change: Callable[[], None] = lambda: None) -> None:
        self._database, self.on_change = database, on_change
        self._lock = threading.Lock()

    def get(self) -> Pending | None:
        """Raises DocumentInvalid when another version wrote it."""
        text = self._database.fact(_FACT)
        return loads(Pending, text, "state.db: shared engine") if text else None

    def begin(self, pending: Pending) -> None:
        """Raises Exhausted when the disk is full."""
        with self._lock:
            self._database.set_facts({_FACT: canonical_json(pending).decode()})
        self.on_change()

    def prove(self, pending: Pending) -> Pending:
        """Raises Exhausted."""
        proven = replace(pending, proven=True)
        with self._lock:
            if self.get() == pending:
                self._database.set_facts({_FACT: canonical_json(proven).decode()})
        return proven

    def end(self, pending: Pending) -> None:
        """Unless another one has begun meanwhile."""
        with self._lock:
            now = self.get()
            if now is not None and now.generation == pending.generation:
                self._database.set_facts({_FACT: ""})
