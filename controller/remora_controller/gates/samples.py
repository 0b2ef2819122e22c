"""The newest samples of what gates look at, by device: kept in memory, filled from what devices
send and, after a start, from the store's history. Thread-safe.

Keeps only metrics that an open rollout's gates name. What serving measures (times, tokens a
second) is kept only where tokens were made since the sample before: the rest repeats an old value,
and a device that is idle gives no evidence.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field

from remora_controller.domain import MetricPoint
from remora_controller.gates.evaluate import Samples

KEPT = 360  # of each series: an hour at the agent's default interval
TOKENS = "completion_tokens_total"
ONLY_UNDER_LOAD = frozenset(
    {"ttft_s", "ttft_p95_s", "inter_token_s", "tokens_per_s", "scheduler_step_s"}
)


@dataclass
class _Track:
    at: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def add(self, at: float, value: float) -> None:
        """Samples that are not newer than the last are known already."""
        if self.at and at <= self.at[-1]:
            return
        self.at.append(at)
        self.values.append(value)
        if len(self.at) >= 2 * KEPT:
            del self.at[:-KEPT], self.values[:-KEPT]

    def between(self, since: float, until: float) -> Samples:
        """Of since <= at < until, the newest KEPT at most."""
        end = bisect_left(self.at, until)
        begin = max(bisect_left(self.at, since), end - KEPT)
        values = tuple(self.values[begin:end])
        base = self.values[begin - 1] if begin > 0 and values else None
        first = self.at[begin - 1 if base is not None else begin] if values else 0.0
        return Samples(values, base, self.at[end - 1] - first if values else 0.0)


@dataclass
class _DeviceTracks:
    series: dict[str, _Track] = field(default_factory=dict)
    tokens: float | None = None  # newest count, and when it was told
    tokens_at: float = 0.0
    is_busy: bool = False


class SampleKeeper:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted: frozenset[str] = frozenset()
        self._devices: dict[str, _DeviceTracks] = {}

    def want(self, metrics: frozenset[str]) -> frozenset[str]:
        """Keeps these from now on and drops all others; those that were not kept before."""
        with self._lock:
            new = metrics - self._wanted
            gone = self._wanted - metrics
            self._wanted = metrics
            if not metrics:
                self._devices.clear()
            elif gone:
                self._drop_unwanted()
            return new

    def _drop_unwanted(self) -> None:
        for tracks in self._devices.values():
            kept = {n: t for n, t in tracks.series.items() if self._kept(n)}
            tracks.series = kept

    def _kept(self, name: str) -> bool:
        return name in self._wanted or name.partition(".")[0] in self._wanted

    def add(self, points: Iterable[MetricPoint]) -> None:
        """Of any device; those of one device in the order in which it measured them."""
        with self._lock:
            if not self._wanted:
                return
            for point in points:
                self._add(point)

    def fill(self, points: Iterable[MetricPoint]) -> None:
        """History of metrics just wanted, by device and as they came: goes before whatever came in
        meanwhile."""
        with self._lock:
            devices, self._devices = self._devices, {}
            for point in points:
                self._add(point)
            for device_id, tracks in devices.items():
                self._append(device_id, tracks)

    def _append(self, device_id: str, newer: _DeviceTracks) -> None:
        filled = self._devices.setdefault(device_id, newer)
        if filled is newer:
            return
        for name, track in newer.series.items():
            whole = filled.series.setdefault(name, _Track())
            if len(track.at) and whole.at and track.at[0] <= whole.at[0]:
                filled.series[name] = track  # it was kept before and reaches further back
                continue
            for at, value in zip(track.at, track.values, strict=True):
                whole.add(at, value)
        filled.tokens, filled.tokens_at = newer.tokens, newer.tokens_at
        filled.is_busy = newer.is_busy

    def _add(self, point: MetricPoint) -> None:
        is_tokens = point.name == TOKENS
        if not is_tokens and not self._kept(point.name):
            return
        tracks = self._devices.setdefault(point.device_id, _DeviceTracks())
        if is_tokens and point.at > tracks.tokens_at:
            tracks.is_busy = tracks.tokens is None or point.value != tracks.tokens
            tracks.tokens, tracks.tokens_at = point.value, point.at
        if point.name in ONLY_UNDER_LOAD and not self._is_fresh(tracks, point):
            return
        if self._kept(point.name):
            tracks.series.setdefault(point.name, _Track()).add(point.at, point.value)

    def _is_fresh(self, tracks: _DeviceTracks, point: MetricPoint) -> bool:
        if point.value == 0.0:
            return False  # how a runtime tells that it has measured nothing yet
        return tracks.is_busy or tracks.tokens_at < point.at

    def samples(
        self, device_id: str, metric: str, since: float, until: float
    ) -> tuple[Samples, ...]:
        """Every series of the metric that has any: its own, or one for each label."""
        with self._lock:
            tracks = self._devices.get(device_id)
            if tracks is None:
                return ()
            own = tracks.series.get(metric)
            labelled = [t for n, t in tracks.series.items() if n.partition(".")[0] == metric]
            found = [t.between(since, until) for t in ([own] if own is not None else labelled)]
            return tuple(s for s in found if s.values)

    def forget(self, device_id: str) -> None:
        with self._lock:
            self._devices.pop(device_id, None)
