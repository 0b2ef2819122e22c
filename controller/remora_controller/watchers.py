"""Open Watch streams: at most one per device, each holding at most the newest poke."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from remora_controller.domain import Assignment


class Watchers:
    def __init__(self) -> None:
        self._queues: dict[str, asyncio.Queue[int | None]] = {}

    def open(self, device_id: str) -> asyncio.Queue[int | None]:
        """A queue of generations; None ends the stream. A second stream ends the first."""
        previous = self._queues.get(device_id)
        queue: asyncio.Queue[int | None] = asyncio.Queue(maxsize=1)
        self._queues[device_id] = queue
        if previous is not None:
            _replace(previous, None)
        return queue

    def close(self, device_id: str, queue: asyncio.Queue[int | None]) -> bool:
        """False when another stream of the device has taken its place, or it was ended."""
        is_current = self._queues.get(device_id) is queue
        if is_current:
            del self._queues[device_id]
        return is_current

    def poke(self, assignments: Iterable[Assignment]) -> None:
        for assignment in assignments:
            queue = self._queues.get(assignment.device_id)
            if queue is not None:
                _replace(queue, assignment.generation)

    def nudge(self, device_id: str) -> None:
        """Sync now, though nothing new is assigned."""
        queue = self._queues.get(device_id)
        if queue is not None and queue.empty():
            queue.put_nowait(0)

    def end(self, device_id: str) -> None:
        queue = self._queues.pop(device_id, None)
        if queue is not None:
            _replace(queue, None)

    def end_all(self) -> None:
        for device_id in list(self._queues):
            self.end(device_id)

    def __contains__(self, device_id: str) -> bool:
        return device_id in self._queues

    def __len__(self) -> int:
        return len(self._queues)


def _replace(queue: asyncio.Queue[int | None], item: int | None) -> None:
    """Only the newest matters: a poke says `Sync now`, not what changed."""
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(item)
