"""The newest samples of what gates look at, by device: kept in memory, filled from what devices
send and, after a start, from the store's history. Thread-safe.

Keeps only metrics that an open rollout's gates name, and of single devices those by which they are
judged alone. What serving measures (times, tokens a
second) is kept only where tokens were made since the sample before: the rest repeats an old value,
and a device that is idle gives no evidence.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Mapping
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
        self._wanted: frozenset[str] = frozenset()  # of every device
        self._wanted_of: dict[str, frozenset[str]] = {}  # besides, of single ones
        self._devices: dict[str, _DeviceTracks] = {}

    def want(self, metrics: frozenset[str]) -> frozenset[str]:
        """Keeps these from now on and drops all others; those that were not kept before."""
        with self._lock:
            new = metrics - self._wanted
            gone = self._wanted - metrics
            self._wanted = metrics
            if gone:
                self._drop_unwanted(list(self._devices))
            return new

    def want_of(self, devices: Mapping[str, frozenset[str]]) -> frozenset[str]:
        """Keeps these too, of these devices alone; those of which more is wanted than before."""
        with self._lock:
            known, self._wanted_of = self._wanted_of, dict(devices)
            self._drop_unwanted(known.keys() - devices.keys())
            return frozenset(d for d, m in devices.items() if m - known.get(d, frozenset()))

    def _drop_unwanted(self, device_ids: Iterable[str]) -> None:
        for device_id in device_ids:
            if not self._wanted and device_id not in self._wanted_of:
                self._devices.pop(device_id, None)
            elif device_id in self._devices:
                tracks = self._devices[device_id]
                tracks.series = {
                    n: t for n, t in tracks.series.items() if self._is_wanted(device_id, n)
                }

    def _is_wanted(self, device_id: str, name: str) -> bool:
        own, kind = self._wanted_of.get(device_id, ()), name.partition(".")[0]
        return name in self._wanted or kind in self._wanted or name in own or kind in own

    def add(self, points: Iterable[MetricPoint]) -> None:
        """Of any device; those of one device in the order in which it measured them."""
        with self._lock:
            if not self._wanted and not self._wanted_of:
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
        is_wanted = self._is_wanted(point.device_id, point.name)
        follows = bool(self._wanted) or point.device_id in self._wanted_of
        if not is_wanted and not (is_tokens and follows):
            return
        tracks = self._devices.setdefault(point.device_id, _DeviceTracks())
        if is_tokens and point.at > tracks.tokens_at:
            tracks.is_busy = tracks.tokens is None or point.value != tracks.tokens
            tracks.tokens, tracks.tokens_at = point.value, point.at
        if point.name in ONLY_UNDER_LOAD and not self._is_fresh(tracks, point):
            return
        if is_wanted:
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

    def newest_at(self, device_id: str, metrics: Iterable[str], until: float) -> float | None:
        """When the device last measured one of them before then."""
        with self._lock:
            tracks = self._devices.get(device_id)
            if tracks is None:
                return None
            wanted = frozenset(metrics)
            found = [
                t.at[end - 1]
                for n, t in tracks.series.items()
                if (n in wanted or n.partition(".")[0] in wanted)
                and (end := bisect_left(t.at, until))
            ]
            return max(found, default=None)

    def forget(self, device_id: str) -> None:
        with self._lock:
            self._devices.pop(device_id, None)
