"""The controller's heartbeat: decide on news and every second, flush, prune, count.

Owns when things run, not what they do. One task on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from remora_contract.errors import Exhausted
from remora_controller.counters import Counters
from remora_controller.domain import Assignment, MetricPoint, Sighting
from remora_controller.driver import RolloutDriver
from remora_controller.late_gates import FLAGGED
from remora_controller.presence import Presence
from remora_controller.store.protocol import Store
from remora_controller.store_thread import StoreThread
from remora_controller.watchers import Watchers

log = logging.getLogger(__name__)
TICK_S = 1.0
GATHER_S = 0.02
# Looking at a rollout costs with its size, while news comes with the size too: of the time at most
# this share, or a large wave would be spent on looking at it.
DECIDING_SHARE = 0.2
FLUSH_EVERY = 5  # ticks
PROMOTE_EVERY = 10  # looks at every device of an experiment that promotes itself
PRUNE_EVERY = 300


class DecisionLoop:
    def __init__(
        self,
        store: Store,
        thread: StoreThread,
        driver: RolloutDriver,
        presence: Presence,
        watchers: Watchers,
        counters: Counters,
        clock: Callable[[], float],
        also_prune: Callable[[], None] = lambda: None,
        promote: Callable[[], bool] = lambda: False,
    ) -> None:
        """Both run on the store's thread: `also_prune` whenever the store is pruned, `promote`
        every ten seconds; it says whether it started a rollout."""
        self._also_prune = also_prune
        self._promote = promote
        self._store = store
        self._thread = thread
        self._driver = driver
        self._presence = presence
        self._watchers = watchers
        self._counters = counters
        self._clock = clock
        self._news = asyncio.Event()
        self._late: set[str] = set()
        self._is_stopping = False
        self._is_full = False
        self._gather_s = GATHER_S

    def wake(self, late_device: str | None = None) -> None:
        """Something changed; `late_device` may have missed a rollout."""
        if late_device is not None:
            self._late.add(late_device)
        self._news.set()

    def stop(self) -> None:
        self._is_stopping = True
        self._news.set()

    async def run(self) -> None:
        """Until `stop`; then flushes once more."""
        loop = asyncio.get_running_loop()
        beat, next_beat_at = 0, loop.time() + TICK_S
        while not self._is_stopping:
            await self._wait(next_beat_at - loop.time())
            is_due = loop.time() >= next_beat_at
            if is_due:
                beat, next_beat_at = beat + 1, loop.time() + TICK_S
            await self._guarded(self._turn(beat if is_due else None))
        await self._guarded(self.flush())

    async def _guarded(self, work: Awaitable[None]) -> None:
        """A full disk ends nothing: what was decided is decided again when there is room."""
        try:
            await work
        except Exhausted as e:
            if not self._is_full:
                log.error("store.full", extra={"cause": str(e)})
            self._is_full = True
        else:
            self._is_full = False

    async def _turn(self, beat: int | None) -> None:
        await self._decide()
        if beat is not None:
            await self._housekeep(beat)

    async def _wait(self, limit_s: float) -> None:
        """For news, or the next beat. News that comes in a burst is decided about once."""
        try:
            await asyncio.wait_for(self._news.wait(), max(0.0, limit_s))
            await asyncio.sleep(self._gather_s)
        except asyncio.TimeoutError:
            pass  # the beat is due
        self._news.clear()

    async def _decide(self) -> None:
        late, self._late = self._late, set()
        made, seconds = await self._thread.call(self._tick, late)
        self._watchers.poke(made)
        self._gather_s = gather_s(seconds)

    def _tick(self, late: set[str]) -> tuple[list[Assignment], float]:
        """The new assignments, and how long it took to make them."""
        started = time.monotonic()
        self._driver.check_late(late)
        made = self._driver.tick(self._clock())
        return made, time.monotonic() - started

    async def _housekeep(self, beat: int) -> None:
        if beat % FLUSH_EVERY == 0:
            await self.flush()
            await self._thread.call(self._count)
        if beat % PROMOTE_EVERY == 0 and await self._thread.call(self._promote):
            self.wake()
        if beat % PRUNE_EVERY == 0:
            await self._thread.call(self._store.prune, self._clock())
            await self._thread.call(self._also_prune)

    async def flush(self) -> None:
        """Stores what is only in memory: heartbeats and metrics."""
        sightings, points = self._presence.take_unsaved()
        await self._thread.call(self._save, sightings, points)

    def _save(self, sightings: list[Sighting], points: list[MetricPoint]) -> None:
        """What a full disk does not take is tried again with the next flush. Raises Exhausted."""
        try:
            if points:
                self._store.add_metrics(points)
                points = []
            if sightings:
                self._store.record_sightings(sightings)
                sightings = []
            self._save_arms()
        except Exhausted:
            self._presence.put_back(sightings, points)
            raise

    def _save_arms(self) -> None:
        tally = self._presence.tally
        counted, dropped = tally.take_unsaved()
        try:
            if counted or dropped:
                self._store.save_arm_counts(counted, dropped)
        except Exhausted:
            tally.put_back(counted, dropped)
            raise

    def _count(self) -> None:
        now = self._clock()
        statuses = Counter(
            standing or ("online" if self._presence.is_online(device_id, now) else "offline")
            for device_id, standing in self._store.standings()
        )
        states = Counter(r.state.value for r in self._store.rollouts(1000))
        self._counters.devices_by_status = dict(statuses)
        self._counters.rollouts_by_state = dict(states)
        late = Counter(flag.state for flag in self._store.late_flags())
        self._counters.late_by_state = {s.value.lower(): late[s] for s in FLAGGED}
        self._counters.watchers = len(self._watchers)


def gather_s(decision_s: float) -> float:
    """How long to let news gather after a decision that took so long."""
    return min(TICK_S, max(GATHER_S, decision_s * (1 / DECIDING_SHARE - 1)))
