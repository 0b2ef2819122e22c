"""Group commit: Syncs that arrive together are stored in one transaction, and each waits for it.

A device drops its events once it is told that they are stored, so that must be true.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from remora_contract.errors import Exhausted
from remora_controller.domain import SyncRecord
from remora_controller.store.protocol import DeviceStore
from remora_controller.store_thread import StoreThread

MAX_WAITING = 20_000
_BATCH = 500


class SyncWriter:
    def __init__(self, store: DeviceStore, thread: StoreThread) -> None:
        self._store = store
        self._thread = thread
        self._waiting: list[tuple[SyncRecord, asyncio.Future[None]]] = []
        self._running: asyncio.Task[None] | None = None

    async def write(self, record: SyncRecord) -> None:
        """Returns when the record is durable. Raises Exhausted when too many wait."""
        if len(self._waiting) >= MAX_WAITING:
            raise Exhausted("too many devices report at once; the next Sync will do", 5.0)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((record, stored))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        await stored

    async def _run(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
            records: Sequence[SyncRecord] = [record for record, _ in batch]
            outcome = await asyncio.gather(
                self._thread.call(self._store.record_syncs, records), return_exceptions=True
            )
            for _, stored in batch:
                _settle(stored, outcome[0])
        self._running = None


def _settle(stored: asyncio.Future[None], outcome: BaseException | None) -> None:
    if stored.done():
        return  # the call was cancelled meanwhile; the record is stored all the same
    if outcome is None:
        stored.set_result(None)
    else:
        stored.set_exception(outcome)
