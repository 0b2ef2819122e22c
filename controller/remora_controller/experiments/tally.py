"""What each arm of an experiment counted, on each device, newest totals alone: apart from a
device's other metrics and outside their bound, as arms come and go with releases. Thread-safe.

A device tells totals over the life of its identity. One that died without writing them down tells
less afterwards: what was known stays, and growth counts from what it tells now. So no total ever
falls, nothing is counted twice, and what is lost is what the device never told before it died.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from remora_contract.experiments import (
    ARM_COUNTS,
    ARM_PREFIX,
    SHADOW_COUNTS,
    SHADOW_PREFIX,
    TOTAL,
)
from remora_controller.domain import MetricPoint

MAX_KEPT = 32  # labels of one device, those told last: a release has eight at most
MAX_VALUE = 2.0**53  # whole numbers beyond it are not exact, and sums must stay finite
_LABEL = re.compile(r"[A-Za-z0-9._+-]{1,64}/[A-Za-z0-9_-]{1,32}/[0-9a-f]{12}")
_NAMES = frozenset(
    [ARM_PREFIX + n for n in ARM_COUNTS] + [SHADOW_PREFIX + n for n in SHADOW_COUNTS]
)


@dataclass(frozen=True)
class Counted:
    """`told` by the device last; `carried`: by how much it fell, all falls together."""

    told: float
    carried: float = 0.0

    @property
    def total(self) -> float:
        return self.told + self.carried


def followed(known: Counted | None, told: float) -> Counted:
    if known is None:
        return Counted(told)
    return Counted(told, known.carried + max(0.0, known.told - told))


@dataclass(frozen=True)
class ArmRow:
    """Of one device and one label EXPERIMENT/ARM/IDENTITY; counts by `experiment_requests` and so
    on."""

    device_id: str
    label: str
    at: float
    counts: Mapping[str, Counted]


@dataclass(frozen=True)
class Sum:
    """Of one label over devices."""

    devices: int
    counts: Mapping[str, float]


@dataclass
class _Arm:
    at: float = 0.0
    counts: dict[str, Counted] = field(default_factory=dict)


_Key = tuple[str, str]  # device, label


class ExperimentTally:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._devices: dict[str, dict[str, _Arm]] = {}
        self._unsaved: set[_Key] = set()
        self._dropped: set[_Key] = set()

    def load(self, rows: Iterable[ArmRow]) -> None:
        """What the store knew when this process began."""
        with self._lock:
            for row in sorted(rows, key=lambda r: r.at):
                arms = self._devices.setdefault(row.device_id, {})
                arms[row.label] = _Arm(row.at, dict(row.counts))

    def take(self, points: Iterable[MetricPoint]) -> list[MetricPoint]:
        """Counts what arms counted; the other points."""
        others = []
        with self._lock:
            for point in points:
                name, _, label = point.name.partition(".")
                name = name.removesuffix(TOTAL) if name.endswith(TOTAL) else ""
                if name not in _NAMES or not _LABEL.fullmatch(label):
                    others.append(point)
                elif 0 <= point.value <= MAX_VALUE:
                    self._count(point, name, label)
        return others

    def _count(self, point: MetricPoint, name: str, label: str) -> None:
        arms = self._devices.setdefault(point.device_id, {})
        arm = arms.pop(label, None) or _Arm()
        arms[label] = arm  # the one told last stands last
        if point.at >= arm.at:
            known = arm.counts.get(name)
            arm.at, arm.counts[name] = point.at, followed(known, point.value)
            if arm.counts[name] != known:
                self._unsaved.add((point.device_id, label))
        while len(arms) > MAX_KEPT:
            self._drop(point.device_id, next(iter(arms)))

    def _drop(self, device_id: str, label: str) -> None:
        del self._devices[device_id][label]
        self._unsaved.discard((device_id, label))
        self._dropped.add((device_id, label))

    def take_unsaved(self) -> tuple[list[ArmRow], list[_Key]]:
        """What the store has not heard, and what it may forget; the caller sees to it."""
        with self._lock:
            rows = [
                ArmRow(d, label, arm.at, dict(arm.counts))
                for d, label in sorted(self._unsaved)
                if (arm := self._devices[d][label])
            ]
            dropped = sorted(self._dropped)
            self._unsaved.clear()
            self._dropped.clear()
            return rows, dropped

    def put_back(self, rows: Iterable[ArmRow], dropped: Iterable[_Key]) -> None:
        """The store could not take them."""
        with self._lock:
            self._unsaved |= {
                (r.device_id, r.label)
                for r in rows
                if r.label in self._devices.get(r.device_id, {})
            }
            self._dropped |= {(d, n) for d, n in dropped if n not in self._devices.get(d, {})}

    def sums(self, labels: Collection[str], device_ids: Iterable[str]) -> dict[str, Sum]:
        """Of these labels over these devices."""
        counts: dict[str, Counter[str]] = {label: Counter() for label in labels}
        devices: Counter[str] = Counter()
        with self._lock:
            for device_id in device_ids:
                arms = self._devices.get(device_id, {})
                for label in arms.keys() & counts.keys():
                    devices[label] += 1
                    counts[label].update({n: c.total for n, c in arms[label].counts.items()})
        return {label: Sum(devices[label], dict(counts[label])) for label in labels}

    def forget(self, device_id: str) -> None:
        with self._lock:
            for label in self._devices.pop(device_id, {}):
                self._unsaved.discard((device_id, label))
