"""What a check's tree comes to over the samples of some devices. Pure.

avg is the mean of the devices' means, so that a device with more samples weighs no more; min, max,
p50 to p99 (nearest rank) and count are over all samples together; last is the mean of the newest;
increase and rate (per second) add up what counters grew by, over restarts that set them to zero.
A metric with labels (`temperature_celsius`) stands for all its series.

None is a number that nobody knows: nothing was measured, or a division by zero. A comparison with
it is unknown; `false and unknown` is false, `true or unknown` is true.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from remora_controller.gates.syntax import (
    Arithmetic,
    Baseline,
    Comparison,
    Condition,
    Counted,
    Measured,
    Number,
    NumberNode,
)


@dataclass(frozen=True)
class Samples:
    """Of one series of one device, oldest first. `base` is the value just before the first, for
    counters; `span_s` reaches from it (else from the first) to the last."""

    values: tuple[float, ...]
    base: float | None = None
    span_s: float = 0.0


Series = Mapping[str, tuple[Samples, ...]]  # by metric: several where it has labels


@dataclass(frozen=True)
class DeviceEvidence:
    """What a device measured since it serves the new release, and before it was assigned."""

    device_id: str
    now: Series = field(default_factory=dict)
    before: Series = field(default_factory=dict)


@dataclass(frozen=True)
class Scene:
    """What a check is evaluated over; `counted` are the rollout's own values."""

    devices: Sequence[DeviceEvidence]
    counted: Mapping[str, float | None]
    is_baseline: bool = False

    def of(self, metric: str) -> list[tuple[Samples, ...]]:
        """Device by device, those that have it."""
        found = [(d.before if self.is_baseline else d.now).get(metric, ()) for d in self.devices]
        return [series for series in found if any(s.values for s in series)]


def number(node: NumberNode, scene: Scene) -> float | None:
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Counted):
        return scene.counted[node.name]
    if isinstance(node, Measured):
        series = scene.of(node.metric)
        return _FUNCTIONS[node.function](series) if series else None
    if isinstance(node, Baseline):
        return number(node.of, Scene(scene.devices, scene.counted, is_baseline=True))
    return _arithmetic(node, number(node.left, scene), number(node.right, scene))


def truth(node: Condition, scene: Scene) -> bool | None:
    """None: unknown."""
    if isinstance(node, Comparison):
        left, right = number(node.left, scene), number(node.right, scene)
        if left is None or right is None:
            return None
        return bool(_COMPARE[node.operator](left, right))
    found = [truth(operand, scene) for operand in node.operands]
    if node.operator == "not":
        return None if found[0] is None else not found[0]
    decisive = node.operator == "or"
    if decisive in found:
        return decisive
    return None if None in found else not decisive


def _arithmetic(node: Arithmetic, left: float | None, right: float | None) -> float | None:
    if left is None or right is None or (node.operator == "/" and right == 0):
        return None
    result = _COMPUTE[node.operator](left, right)
    return result if math.isfinite(result) else None


_COMPUTE: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_Device = tuple[Samples, ...]


def _values(device: _Device) -> list[float]:
    return [v for samples in device for v in samples.values]


def _pooled(devices: Iterable[_Device]) -> list[float]:
    return [v for device in devices for v in _values(device)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _average(devices: Sequence[_Device]) -> float:
    return _mean([_mean(_values(d)) for d in devices])


def _last(devices: Sequence[_Device]) -> float:
    return _mean([_mean([s.values[-1] for s in d if s.values]) for d in devices])


def _quantile(q: float) -> Callable[[Sequence[_Device]], float]:
    def quantile(devices: Sequence[_Device]) -> float:
        ordered = sorted(_pooled(devices))
        return ordered[max(0, math.ceil(q * len(ordered)) - 1)]

    return quantile


def _growth(samples: Samples) -> float:
    """A counter that falls has begun again from zero."""
    known = samples.values[0] if samples.base is None else samples.base
    grown = 0.0
    for value in samples.values:
        grown += value - known if value >= known else value
        known = value
    return grown


def _increase(devices: Sequence[_Device]) -> float:
    return math.fsum(_growth(s) for d in devices for s in d if s.values)


def _rate(devices: Sequence[_Device]) -> float | None:
    parts = [(_growth(s), s.span_s) for d in devices for s in d if s.values]
    if any(span <= 0 for _, span in parts):
        return None
    return math.fsum(grown / span for grown, span in parts)


_FUNCTIONS: dict[str, Callable[[Sequence[_Device]], float | None]] = {
    "avg": _average,
    "min": lambda devices: min(_pooled(devices)),
    "max": lambda devices: max(_pooled(devices)),
    "last": _last,
    "count": lambda devices: float(len(_pooled(devices))),
    "p50": _quantile(0.5),
    "p90": _quantile(0.9),
    "p95": _quantile(0.95),
    "p99": _quantile(0.99),
    "increase": _increase,
    "rate": _rate,
}
