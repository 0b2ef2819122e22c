"""Who is there, in memory: last sightings and newest metrics, flushed to the store in batches.

A heartbeat without news never becomes a row of its own. Time comes in; knows no store. Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence

from remora_controller.domain import BootTrail, Device, MetricPoint, Sighting
from remora_controller.experiments.tally import ExperimentTally
from remora_controller.gates.samples import SampleKeeper

MAX_PENDING_POINTS = 50_000
MAX_METRICS_PER_DEVICE = 256
MAX_TURNED_AWAY = 1000
TURNED_AWAY_S = 300.0
CLOCK_SET_S = 5.0


class Presence:
    def __init__(self, started_at: float, offline_after_s: float) -> None:
        self._started_at = started_at
        self.offline_after_s = offline_after_s
        self._seen: dict[str, float] = {}
        self._awaited: dict[str, float] = {}  # until when a device's silence means nothing
        self._trails: dict[str, BootTrail] = {}
        self._ahead_s: dict[str, float] = {}
        self._dirty: set[str] = set()
        self._metrics: dict[str, dict[str, MetricPoint]] = {}
        self._pending: list[MetricPoint] = []
        self._turned_away: dict[str, float] = {}
        # The event loop writes while decisions, on the store's thread, read.
        self._lock = threading.Lock()
        self.samples = SampleKeeper()  # of metrics that gates look at
        self.tally = ExperimentTally()  # of arms: apart from a device's other metrics

    def load(
        self,
        devices: Iterable[Device],
        metrics: Mapping[str, dict[str, MetricPoint]],
        longest_wait_s: float = 0.0,
    ) -> None:
        """What the store knew when this process began; the former process asked nobody to stay
        away for longer than `longest_wait_s`."""
        for device in devices:
            self._trails[device.device_id] = device.trail
            if device.last_seen is not None:
                self._seen[device.device_id] = device.last_seen
                self.awaits(device.device_id, device.last_seen, longest_wait_s)
        self._metrics = {device_id: dict(points) for device_id, points in metrics.items()}

    def trail(self, device_id: str) -> BootTrail:
        return self._trails.get(device_id, BootTrail())

    def seen(self, device_id: str, trail: BootTrail, now: float, *, is_stored: bool) -> None:
        """`is_stored`: the store hears of it by other means, no flush is needed."""
        with self._lock:
            self._seen[device_id] = now
            self._trails[device_id] = trail
            if is_stored:
                self._dirty.discard(device_id)
            else:
                self._dirty.add(device_id)

    def awaits(self, device_id: str, now: float, wait_s: float) -> None:
        """It was asked to speak again in `wait_s`, or earlier. Late is who exceeds that by half
        of `offline_after_s`; nobody is late before `offline_after_s` itself."""
        with self._lock:
            patience_s = max(self.offline_after_s, wait_s + self.offline_after_s / 2)
            self._awaited[device_id] = now + patience_s

    def ahead_s(self, device_id: str, measured_s: float) -> float:
        """How far the device's clock is ahead. A call measures it less its own delay, so the most
        that was measured holds, and what a device tells twice has one time; until it is off by so
        much that the clock was set."""
        with self._lock:
            known = self._ahead_s.get(device_id)
            if known is None or not known - CLOCK_SET_S <= measured_s <= known:
                self._ahead_s[device_id] = measured_s
            return self._ahead_s[device_id]

    def left(self, device_id: str, now: float) -> None:
        """Its stream ended: it has `offline_after_s` to return, whatever it was asked."""
        with self._lock:
            until = now + self.offline_after_s
            self._awaited[device_id] = min(until, self._awaited.get(device_id, until))

    def last_seen(self, device_id: str) -> float | None:
        return self._seen.get(device_id)

    def sightings(self) -> dict[str, float]:
        """Of every device that was seen, when it was last."""
        with self._lock:
            return dict(self._seen)

    def is_online(self, device_id: str, now: float) -> bool:
        seen = self._seen.get(device_id)
        if seen is None:
            return False
        return now < max(seen + self.offline_after_s, self._awaited.get(device_id, seen))

    def is_gone(self, device_id: str, now: float) -> bool:
        """Surely away: also this process has listened for long enough to have heard it."""
        if now - self._started_at < self.offline_after_s:
            return False
        return not self.is_online(device_id, now)

    def online(self, now: float) -> frozenset[str]:
        return frozenset(d for d in self.sightings() if self.is_online(d, now))

    def count(self) -> int:
        """Devices seen at any time: what the Sync interval is spread over."""
        return len(self._seen)

    def forget(self, device_id: str) -> None:
        self.samples.forget(device_id)
        self.tally.forget(device_id)
        with self._lock:
            self._seen.pop(device_id, None)
            self._awaited.pop(device_id, None)
            self._ahead_s.pop(device_id, None)
            self._trails.pop(device_id, None)
            self._metrics.pop(device_id, None)
            self._dirty.discard(device_id)

    def turn_away(self, device_id: str, now: float) -> None:
        """A removed device called. The longest ago are forgotten when there are many."""
        with self._lock:
            self._turned_away.pop(device_id, None)
            self._turned_away[device_id] = now
            if len(self._turned_away) > MAX_TURNED_AWAY:
                del self._turned_away[next(iter(self._turned_away))]

    def turned_away(self, now: float) -> dict[str, float]:
        """Who was lately, and when last."""
        with self._lock:
            return {d: at for d, at in self._turned_away.items() if now - at < TURNED_AWAY_S}

    def add_metrics(self, device_id: str, points: Iterable[MetricPoint]) -> None:
        """Newest value of each name; names beyond the bound are dropped, so is history that the
        store cannot keep up with (oldest first). What arms counted is in the tally alone, but for
        gates that look at it."""
        points = list(points)
        self.samples.add(points)
        points = self.tally.take(points)
        with self._lock:
            latest = self._metrics.setdefault(device_id, {})
            for point in points:
                known = latest.get(point.name)
                if known is None and len(latest) >= MAX_METRICS_PER_DEVICE:
                    continue
                if known is None or point.at >= known.at:
                    latest[point.name] = point
                self._pending.append(point)
            del self._pending[: max(0, len(self._pending) - MAX_PENDING_POINTS)]

    def metrics(self, device_id: str) -> Mapping[str, MetricPoint]:
        with self._lock:
            return dict(self._metrics.get(device_id, {}))

    def unsaved_points(self) -> list[MetricPoint]:
        """The samples that the store has not heard yet, as they came."""
        with self._lock:
            return list(self._pending)

    def take_unsaved(self) -> tuple[list[Sighting], list[MetricPoint]]:
        """What the store has not heard; the caller stores it."""
        with self._lock:
            sightings = [Sighting(d, self._trails[d], self._seen[d]) for d in sorted(self._dirty)]
            points, self._pending = self._pending, []
            self._dirty.clear()
            return sightings, points

    def put_back(self, sightings: Iterable[Sighting], points: Sequence[MetricPoint]) -> None:
        """The store could not take them; samples go before what came since."""
        with self._lock:
            self._dirty |= {s.device_id for s in sightings} & self._trails.keys()
            self._pending[:0] = points
            del self._pending[: max(0, len(self._pending) - MAX_PENDING_POINTS)]
