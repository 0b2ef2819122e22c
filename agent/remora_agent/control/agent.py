"""The agent as a running thing: its threads, their beginning and their end.

    worker    drives the activation (`reconcile`)
    sync      speaks with the controller (`sync`), renews the certificate after it
    watch     waits for pokes
    sampler   measures
    sharer    renews leases on engines and uploads them (`sharing.upload`)

The caller's thread waits, keeps the watchdog fed while all five live and what serves is well, and
ends everything. Owns no decision; everything it needs is handed in by `compose`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from remora_agent.control.client import ControllerClient
from remora_agent.control.diagnostics import Diagnostics
from remora_agent.control.reconcile import Reconciler
from remora_agent.control.sharing.upload import Sharer
from remora_agent.control.state import Database, DeviceState
from remora_agent.control.sync import SyncLoop
from remora_agent.control.watch import Watcher
from remora_agent.host import ServingHost
from remora_agent.telemetry.sampler import Sampler
from remora_agent.telemetry.source import Reading
from remora_agent.telemetry.spool import MetricSpool
from remora_contract.errors import Exhausted, InternalFault

log = logging.getLogger(__name__)
_JOIN_S = 10.0
_RESTORING_TICK_S = 0.1  # until the committed release serves, so that `ready` is told at once


@dataclass(frozen=True)
class Telemetry:
    sampler: Sampler
    spool: MetricSpool
    interval_s: float
    unix_now: Callable[[], float]
    events_dropped: Callable[[], int]

    def tick(self) -> None:
        dropped = Reading("events_dropped", float(self.events_dropped()))
        self.spool.add([*self.sampler.sample(), dropped], self.unix_now())


@dataclass
class Parts:
    """What `compose` made. `close` also closes the client in use."""

    database: Database
    state: DeviceState
    reconciler: Reconciler
    host: ServingHost
    sync: SyncLoop
    watch: Watcher
    telemetry: Telemetry
    sharer: Sharer
    client: ControllerClient
    diagnostics: Diagnostics
    drain_s: float
    kernel_boot_id: str


@dataclass(frozen=True)
class Supervisor:
    """How whoever started the process hears of it (systemd, a test)."""

    ready: Callable[[], None] = lambda: None
    alive: Callable[[], None] = lambda: None
    stopping: Callable[[], None] = lambda: None
    tick_s: float = 5.0


@dataclass
class Agent:
    parts: Parts
    supervisor: Supervisor = field(default_factory=Supervisor)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Until `stop` is set. Raises InternalFault when a thread died of a bug, after draining:
        the service manager starts the agent again."""
        parts, restored = self.parts, threading.Event()
        parts.reconciler.start(parts.kernel_boot_id)
        threads = [
            _thread("worker", lambda: parts.reconciler.run(restored)),
            _thread("sync", parts.sync.run),
            _thread("watch", parts.watch.run),
            _thread("sampler", self._sample),
            _thread("sharer", parts.sharer.run),
        ]
        for thread in threads:
            thread.start()
        dead = self._wait(threads, restored)
        self._shut_down(threads)
        if dead is not None:
            raise InternalFault(f"the agent's {dead} thread ended; the log above says why")
        try:
            parts.state.end_run()
        except Exhausted as e:  # the next start counts this end as an abnormal one
            log.error("state_dir.full", extra={"cause": str(e)})
        parts.database.close()
        log.info("agent.stopped")

    def _wait(self, threads: list[threading.Thread], restored: threading.Event) -> str | None:
        """The name of the thread that died, or None when asked to stop."""
        announced, unwell = False, 0
        while not self.stop.is_set():
            if not announced and restored.is_set():
                self.supervisor.ready()
                announced = True
            dead = next((t.name for t in threads if not t.is_alive()), None)
            if dead is not None:
                return dead
            # A few ticks: while soaking, the reconciler gets the time to switch back by itself.
            unwell = 0 if self.parts.host.healthy() else unwell + 1
            if unwell > 2:
                return "step"
            if not unwell:
                self.supervisor.alive()
            self.stop.wait(self.supervisor.tick_s if announced else _RESTORING_TICK_S)
        return None

    def _sample(self) -> None:
        telemetry = self.parts.telemetry
        while not self.stop.wait(telemetry.interval_s):
            telemetry.tick()

    def _shut_down(self, threads: list[threading.Thread]) -> None:
        self.stop.set()
        # First, so that work which the supervisor cancels counts as interrupted, not as failed.
        self.parts.reconciler.stop()
        self.supervisor.stopping()
        self.parts.sync.stop()
        self.parts.watch.stop()
        self.parts.diagnostics.stop()
        self.parts.sharer.stop()
        self.parts.host.drain(self.parts.drain_s)
        self.parts.client.close()
        for thread in threads:
            thread.join(_JOIN_S)
        self.parts.telemetry.spool.flush()
        self.parts.telemetry.sampler.close()


def _thread(name: str, target: Callable[[], None]) -> threading.Thread:
    # Daemons: a build that does not hear the stop must not keep the process from ending.
    return threading.Thread(target=target, name=name, daemon=True)
