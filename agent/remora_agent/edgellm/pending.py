"""The requests of an `EdgeModel` that wait: a bounded queue in the order of arrival."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from remora_agent.bank.directory import Registered
from remora_agent.runtime.api import GenerationRequest, OnEvent, Provenance
from remora_contract.errors import Conflict, Exhausted, RemoraError

_RETRY_AFTER_S = 5.0


@dataclass
class Waiting:
    request: GenerationRequest
    on_event: OnEvent
    provenance: Provenance
    adapter: Registered | None
    arrived_s: float
    cancelled: bool = field(default=False, compare=False)  # while it runs

    @property
    def id(self) -> str:
        return self.request.request_id


class Pending:
    """What waits, and the one that runs. Thread-safe."""

    def __init__(self, most: int, most_tokens: int) -> None:
        self._most, self._most_tokens = most, most_tokens
        self.changed = threading.Condition()
        self._queue: deque[Waiting] = deque()
        self.running: Waiting | None = None
        self._refusal: RemoraError | None = None

    def __len__(self) -> int:
        with self.changed:
            return len(self._queue)

    def refuse(self, error: RemoraError) -> None:
        """From now on nothing is added; the first reason counts."""
        with self.changed:
            self._refusal = self._refusal or error
            self.changed.notify_all()

    def add(self, new: Sequence[Waiting]) -> None:
        """All or none. Raises what `refuse` said, Conflict for an id in use, Exhausted."""
        with self.changed:
            if self._refusal is not None:
                raise self._refusal
            known = {w.id for w in self._all()}
            for waiting in new:
                if waiting.id in known:
                    raise Conflict(f"request id {waiting.id[:80]!r} is in use; choose another")
                known.add(waiting.id)
            tokens = sum(len(w.request.prompt) for w in (*self._queue, *new))
            if len(self._queue) + len(new) > self._most or tokens > self._most_tokens:
                raise Exhausted(
                    f"{len(self._queue)} requests wait already; try again later", _RETRY_AFTER_S
                )
            self._queue.extend(new)
            self.changed.notify_all()

    def next(self) -> Waiting | None:
        """It runs from now on. None when nothing waits."""
        with self.changed:
            self.running = self._queue.popleft() if self._queue else None
            return self.running

    def ended(self) -> None:
        with self.changed:
            self.running = None
            self.changed.notify_all()

    def take(self, request_id: str) -> Waiting | None:
        """Out of the queue; None when it does not wait."""
        with self.changed:
            found = next((w for w in self._queue if w.id == request_id), None)
            if found is not None:
                self._queue.remove(found)
                self.changed.notify_all()
            return found

    def take_all(self) -> list[Waiting]:
        with self.changed:
            return [w for w in list(self._queue) if self.take(w.id)]

    def take_among(self, ids: Collection[str]) -> list[Waiting]:
        with self.changed:
            return [w for w in list(self._queue) if w.id in ids and self.take(w.id)]

    def take_late(self, now: float) -> list[Waiting]:
        """Those whose deadline has passed."""
        with self.changed:
            late = [w for w in self._queue if (w.request.deadline_s or now + 1) <= now]
            return [w for w in late if self.take(w.id)]

    def of_adapter(self, digest: str) -> list[str]:
        with self.changed:
            return [w.id for w in self._all() if w.adapter and w.adapter.digest == digest]

    def wait_empty(self, timeout_s: float) -> bool:
        with self.changed:
            return self.changed.wait_for(
                lambda: not self._queue and self.running is None, timeout_s
            )

    def _all(self) -> list[Waiting]:
        return [*self._queue, *([self.running] if self.running else [])]
