"""One device without threads or network: the reconciler stepped by hand over a folder."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from datetime import timezone
from pathlib import Path

from remora_agent.control.activation import Desired, Record
from remora_agent.control.effects import Effects
from remora_agent.control.fetch import ChunkFetcher, Pace
from remora_agent.control.holds import Holds
from remora_agent.control.interrupt import Interrupt
from remora_agent.control.layout import StateLayout
from remora_agent.control.pacing import RateLimit
from remora_agent.control.reconcile import Reconciler
from remora_agent.control.staging import Stager
from remora_agent.control.state import Database, DeviceState
from remora_agent.update_locks import LockBook
from remora_contract.device_phase import Phase
from remora_contract.digests import canonical_json
from remora_contract.errors import Exhausted
from remora_contract.release import Release
from tests.agent.control.test_staging import Source
from tests.support.scripted_host import ScriptedHost


class Crash(BaseException):
    """SIGKILL, as far as the code under test can tell: nothing catches it."""


def no_room():
    raise Exhausted("state.db cannot grow: the disk is full; free space")


class Device:
    """`boot()` is a process start over the same state directory, with a new, empty host."""

    def __init__(self, root: Path, repository: Path) -> None:
        self.layout = StateLayout(root)
        self.layout.create()
        self.source = Source(repository)
        self.clock = [1000.0]
        self.events: list[tuple[str, dict[str, object]]] = []
        self.generation = 0
        self.boot()

    def boot(
        self, kernel_boot_id: str = "k1", is_full: bool = False, last_words: str = ""
    ) -> Device:
        """`is_full`: state.db cannot grow, as on a full disk."""
        self.host = ScriptedHost()
        self.database = Database(self.layout.database)
        if is_full:
            self.fill()
        self.state = DeviceState(self.database)
        interrupt = Interrupt()
        pace = Pace(interrupt, time.monotonic, random.Random(1).random)
        fetcher = ChunkFetcher(self.layout.root, self.source, pace, RateLimit(None, 0.0))
        stager = Stager(self.layout, self.source, fetcher, pace, 0)
        self.effects = Effects(self.layout, self.host, stager, self._emit)
        self.locks = LockBook(self.layout.update_locks, lambda: self.clock[0], 600.0)
        self.holds = Holds(self.database, self.locks, lambda: self.clock[0], lambda: timezone.utc)
        self.reconciler = Reconciler(
            self.state,
            self.effects,
            interrupt,
            lambda: self.clock[0],
            random.Random(2).random,
            holding=self.holds.holding,
            last_words=last_words,
        )
        self.reconciler.start(kernel_boot_id)
        self.reconciler._ensure_serving()
        return self

    def fill(self) -> None:
        self.database.transaction = no_room

    def crash(self) -> None:
        """The process is gone; SQLite keeps what was committed."""
        self.database.close()

    def stop(self) -> None:
        self.state.end_run()
        self.database.close()

    def assign(self, release: Release, soak_s: float = 0.0, text: bytes | None = None) -> bool:
        self.generation += 1
        document = text or canonical_json(release)
        desired = Desired(
            self.generation, release.release_id, document.decode(), "r1", soak_s, False
        )
        return self.reconciler.assign(desired)

    def assign_nothing(self) -> bool:
        self.generation += 1
        return self.reconciler.assign(Desired(self.generation, None, "", "r1", 0.0, True))

    def settle(self, until: Phase | None = None) -> Record:
        """Steps until idle, or until the phase; time passes when the reconciler waits."""
        for _ in range(200):
            record = self.reconciler.report().record
            if record is not None and record.phase is until:
                return record
            wait_s = self.reconciler.step()
            if wait_s and self.reconciler.report().record.phase is not Phase.SOAKING:
                return self.reconciler.report().record
            self.clock[0] += wait_s
        raise AssertionError(f"never settled: {self.reconciler.report()}")

    @property
    def record(self) -> Record | None:
        return self.reconciler.report().record

    @property
    def running(self) -> str | None:
        serving = self.host.serving()
        return None if serving is None else serving.release_id

    def _emit(self, name: str, detail: Mapping[str, object]) -> None:
        self.events.append((name, dict(detail)))
