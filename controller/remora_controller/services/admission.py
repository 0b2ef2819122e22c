"""May this device talk to us? Removed and unknown ones may not, whatever their certificate says."""

from __future__ import annotations

from collections.abc import Callable

from remora_contract.errors import Forbidden, Refused
from remora_controller.domain import Device
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
        device = await self._thread.call(self._store.device, identity.name)
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
