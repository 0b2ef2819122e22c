"""Counts engine faults as their requests report them: one fault of a batch is one, whatever the
number of requests it ends."""

from __future__ import annotations

import threading

from remora_agent.runtime.api import Event, Failed
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
