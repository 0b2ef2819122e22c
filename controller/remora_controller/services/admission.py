"""May this device talk to us? Removed and unknown ones may not, whatever their certificate says."""

from __future__ import annotations

from collections.abc import Callable

from remora_contract.errors import Forbidden, Refused
from remora_controller.domain import Assignment, Device
from remora_controller.pki import Identity
from remora_controller.presence import Presence
from remora_controller.store.protocol import Store
from remora_controller.store_thread import StoreThread


class Admission:
    def __init__(
        self, store: Store, thread: StoreThread, presence: Presence, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._thread = thread
        self._presence = presence
        self._clock = clock

    async def known_device(self, identity: Identity) -> Device:
        """Raises Forbidden when removed or unknown, Refused when quarantined."""
        found = await self._thread.call(self._store.device, identity.name)
        return self._admitted(identity, found)

    async def known_device_and_assignment(
        self, identity: Identity
    ) -> tuple[Device, Assignment | None]:
        """In one visit to the store: a heartbeat costs little else. Raises what the other does."""
        found, assignment = await self._thread.call(self._read, identity.name)
        return self._admitted(identity, found), assignment

    def _read(self, device_id: str) -> tuple[Device | None, Assignment | None]:
        return self._store.device(device_id), self._store.assignment(device_id)

    def _admitted(self, identity: Identity, device: Device | None) -> Device:
        if device is None or device.removed_at is not None:
            if device is not None:
                self._presence.turn_away(device.device_id, self._clock())
            what = "is not known to this controller" if device is None else "was removed"
            raise Forbidden(
                f"device {identity.name} {what}; join again with a new token "
                "(`remora devices token`, then `remora-agent join --force`)"
            )
        if device.quarantine is not None:
            raise Refused(_held(device, device.quarantine))
        return device


def _held(device: Device, reason: str) -> str:
    if not device.quarantined_by:
        return quarantine_message(device.device_id, reason)
    return f"device {device.device_id} was quarantined by {device.quarantined_by}: {reason}"


def quarantine_message(device_id: str, reason: str) -> str:
    return (
        f"device {device_id} is quarantined, because its identity is used by two machines "
        f"({reason}); remove it with `remora devices remove {device_id}` and join each machine "
        "with a token of its own"
    )
