"""What the host counts by events: engine faults as their requests report them (one fault of a batch
is one, whatever the number of requests it ends), and calls that end between two models."""

from __future__ import annotations

import threading

from remora_agent.runtime.api import Event, Failed, Finished
from remora_contract.errors import EngineFault


class FaultCount:
    """Thread-safe; `observe` runs on step threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: EngineFault | None = None
        self._count = 0

    @property
    def count(self) -> int:
        return self._count

    def observe(self, event: Event) -> None:
        if not isinstance(event, Failed) or not isinstance(event.error, EngineFault):
            return
        with self._lock:
            if event.error is not self._last:
                self._last, self._count = event.error, self._count + 1


class EndCount:
    """Requests that no runtime counts. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended = self._failed = 0

    def observe(self, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            with self._lock:
                self._ended += 1
                self._failed += isinstance(event, Failed)

    def counters(self) -> dict[str, float]:
        """As ModelRuntime.metrics names them."""
        with self._lock:
            return {"requests": float(self._ended), "failures": float(self._failed)}
