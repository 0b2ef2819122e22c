"""Runtimes on their way out: each ends its requests, then closes; their counters are not lost.

Knows nothing of releases.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from remora_agent.runtime.model import Model
from remora_agent.telemetry.serving import COUNTERS

log = logging.getLogger(__name__)


class Retiring:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leaving: dict[Model, threading.Thread | None] = {}
        self._totals: dict[str, float] = {}

    def admit(self, runtime: Model) -> None:
        """From now on its counters are counted here; `close_now` has to follow."""
        with self._lock:
            self._leaving[runtime] = None

    def retire(self, runtime: Model, drain_s: float) -> None:
        """Returns at once. What still runs after `drain_s` ends with Unavailable."""
        thread = threading.Thread(
            target=self._end, args=(runtime, drain_s), name="remora-retire", daemon=True
        )
        with self._lock:
            self._leaving[runtime] = thread
        thread.start()

    def close_now(self, runtime: Model) -> None:
        """Closes an admitted runtime, in this thread, and keeps its counters."""
        runtime.close()
        # After the close: the last step counts itself once its request has ended.
        counters = counted(runtime.metrics())
        with self._lock:
            self._leaving.pop(runtime, None)
            self._totals = added(self._totals, counters)

    def counters(self) -> dict[str, float]:
        """Of all that left or is leaving."""
        with self._lock:
            sums = self._totals
            for runtime in self._leaving:
                sums = added(sums, counted(runtime.metrics()))
            return sums

    def wait(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> bool:
        """Until all have left; whether they did in time."""
        until = clock() + timeout_s
        with self._lock:
            threads = [t for t in self._leaving.values() if t is not None]
        for thread in threads:
            thread.join(max(0.0, until - clock()))
        return not any(thread.is_alive() for thread in threads)

    def _end(self, runtime: Model, drain_s: float) -> None:
        if not runtime.drain(drain_s):
            log.warning("model.drain_incomplete", extra={"waited_s": drain_s})
        self.close_now(runtime)
        log.info("model.retired")


def counted(metrics: Mapping[str, float]) -> dict[str, float]:
    """The entries that only ever grow."""
    return {name: value for name, value in metrics.items() if name in COUNTERS}


def added(some: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """Sums by name."""
    return {name: some.get(name, 0.0) + more.get(name, 0.0) for name in {**some, **more}}
