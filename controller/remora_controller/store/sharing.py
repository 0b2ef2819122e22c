"""The part of the store that shares engines: tickets, and who asked for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from remora_contract.engine import EngineKey
from remora_controller.domain import StoredEvent
from remora_controller.sharing.tickets import Ticket


@dataclass(frozen=True)
class TicketRecord:
    key: EngineKey
    scope: str  # "": the whole fleet, else a site
    ticket: Ticket
    taken: int = 0  # devices that were told to fetch what it holds
    used_at: float = 0.0  # when the last was, or when it came


class SharingStore(Protocol):
    def ticket(self, key_digest: str, scope: str) -> TicketRecord | None: ...

    def tickets(self) -> list[TicketRecord]:
        """All, by key and scope."""
        ...

    def save_ticket(self, record: TicketRecord, events: tuple[StoredEvent, ...] = ()) -> None:
        """A new one, or in place of what was; `taken` and `used_at` stay what the store counts."""
        ...

    def remove_ticket(self, key_digest: str, scope: str, event: StoredEvent) -> bool:
        """False when there is none."""
        ...

    def waiting_since(self, key_digest: str, scope: str, device_id: str) -> float | None: ...

    def note_waiting(self, key_digest: str, scope: str, device_id: str, now: float) -> None:
        """The first time stays."""
        ...

    def forget_waiting(self, key_digest: str, scope: str, device_id: str) -> None: ...

    def note_taken(self, key_digest: str, scope: str, device_id: str, now: float) -> None:
        """It waits no more either. Each device counts once."""
        ...
