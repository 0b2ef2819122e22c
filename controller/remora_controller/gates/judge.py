"""Does a gate pass? `judge(gate, evidence) -> Verdict`, with the numbers behind it. Pure.

PASS and FAIL need evidence: enough devices with enough samples of everything the check measures,
now and, where it compares with the incumbent, before. Everything else is INCONCLUSIVE.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from remora_contract.gates import Gate
from remora_controller.gates.evaluate import DeviceEvidence, Scene, Series, number, truth
from remora_controller.gates.syntax import (
    FAILED,
    FAILURE_FRACTION,
    UNREACHABLE,
    UNREACHABLE_FRACTION,
    Comparison,
    Condition,
    Counted,
    Measured,
    Number,
    NumberNode,
    leaves,
    metrics_of,
    parse_check,
    spelled,
)

_SHOWN_DEVICES = 3
parsed = functools.lru_cache(maxsize=1024)(parse_check)


class Outcome(Enum):
    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class WaveEvidence:
    """`expected` devices of the wave can still give evidence or have given it; `settled` have
    ended, `activated` have switched to the new release and are not back."""

    wave: int
    expected: int
    settled: int = 0
    failed: int = 0
    activated: int = 0
    unreachable: int = 0
    devices: tuple[DeviceEvidence, ...] = ()

    def counted(self) -> dict[str, float | None]:
        return {
            FAILED: float(self.failed),
            FAILURE_FRACTION: self.failed / self.settled if self.settled else None,
            UNREACHABLE: float(self.unreachable),
            UNREACHABLE_FRACTION: self.unreachable / self.activated if self.activated else None,
        }


@dataclass(frozen=True)
class Verdict:
    gate: Gate
    wave: int
    outcome: Outcome
    detail: str  # for people
    devices: int  # with evidence
    numbers: tuple[tuple[str, float], ...] = ()


def judge(gate: Gate, evidence: WaveEvidence) -> Verdict:
    condition = parsed(gate.check)
    measured = [d for d in evidence.devices if _has_everything(d, condition, gate.min_samples)]
    missing = _missing(gate, condition, evidence, len(measured))
    if missing is not None:
        count, why = missing
        return Verdict(gate, evidence.wave, Outcome.INCONCLUSIVE, why, count)
    if gate.scope == "device" and metrics_of(condition):
        return _each(gate, condition, evidence, measured)
    return _together(gate, condition, evidence, measured)


def _missing(
    gate: Gate, condition: Condition, evidence: WaveEvidence, measured: int
) -> tuple[int, str] | None:
    """Devices there are, and of what there is too little; None when there is enough."""
    needed = max(1, min(gate.min_devices, evidence.expected))
    metrics = sorted(metrics_of(condition))
    if metrics and measured < needed:
        what = f"{gate.min_samples} samples of {', '.join(metrics)}"
        if any(is_baseline for _, is_baseline in leaves(condition)):
            what += ", now and before the change"
        return measured, f"{measured} of {needed} devices have {what}"
    names = {leaf.name for leaf, _ in leaves(condition) if isinstance(leaf, Counted)}
    if names & {FAILED, FAILURE_FRACTION} and evidence.settled < needed:
        return evidence.settled, f"{evidence.settled} of {needed} devices have ended"
    if names & {UNREACHABLE, UNREACHABLE_FRACTION} and evidence.activated < needed:
        return evidence.activated, f"{evidence.activated} of {needed} devices have switched"
    return None


def _together(
    gate: Gate, condition: Condition, evidence: WaveEvidence, measured: Sequence[DeviceEvidence]
) -> Verdict:
    scene = Scene(measured, evidence.counted())
    numbers = _numbers(condition, scene)
    found = truth(condition, scene)
    outcome = {True: Outcome.PASS, False: Outcome.FAIL, None: Outcome.INCONCLUSIVE}[found]
    count = len(measured) if metrics_of(condition) else evidence.settled
    said = ", ".join(f"{name} = {value:.4g}" for name, value in numbers)
    unknown = [n for n in _sides(condition) if n not in dict(numbers)]
    if found is None:
        said = ", ".join([*([said] if said else []), f"nothing to compute {unknown[0]} from"])
    return Verdict(gate, evidence.wave, outcome, said, count, numbers)


def _each(
    gate: Gate, condition: Condition, evidence: WaveEvidence, measured: Sequence[DeviceEvidence]
) -> Verdict:
    counted = evidence.counted()
    found = {d.device_id: truth(condition, Scene([d], counted)) for d in measured}
    known = {d: holds for d, holds in found.items() if holds is not None}
    needed = max(1, min(gate.min_devices, evidence.expected))
    if len(known) < needed:
        why = f"only {len(known)} of {needed} devices have numbers for all of it"
        return Verdict(gate, evidence.wave, Outcome.INCONCLUSIVE, why, len(known))
    failing = [d for d in measured if known.get(d.device_id) is False]
    share = len(failing) / len(known)
    outcome = Outcome.FAIL if share > gate.max_failing else Outcome.PASS
    said = f"{len(failing)} of {len(known)} devices fail it"
    if failing:
        said += ": " + "; ".join(
            _of_device(d, condition, counted) for d in failing[:_SHOWN_DEVICES]
        )
    numbers = (("failing_devices", float(len(failing))), ("devices", float(len(known))))
    return Verdict(gate, evidence.wave, outcome, said, len(known), numbers)


def _of_device(
    device: DeviceEvidence, condition: Condition, counted: dict[str, float | None]
) -> str:
    numbers = _numbers(condition, Scene([device], counted))
    said = ", ".join(f"{name} = {value:.4g}" for name, value in numbers)
    return f"{device.device_id} {said}"


def _sides(condition: Condition) -> list[str]:
    return [spelled(side) for side in _compared(condition) if not isinstance(side, Number)]


def _compared(node: Condition) -> list[NumberNode]:
    if isinstance(node, Comparison):
        return [node.left, node.right]
    return [side for operand in node.operands for side in _compared(operand)]


def _numbers(condition: Condition, scene: Scene) -> tuple[tuple[str, float], ...]:
    """Both sides of every comparison, but for plain numbers and what is not known."""
    found: dict[str, float] = {}
    for side in _compared(condition):
        value = number(side, scene)
        if not isinstance(side, Number) and value is not None:
            found[spelled(side)] = value
    return tuple(found.items())


def _has_everything(device: DeviceEvidence, condition: Condition, least: int) -> bool:
    wanted = [(leaf, b) for leaf, b in leaves(condition) if isinstance(leaf, Measured)]
    return all(_count(device.before if b else device.now, m.metric) >= least for m, b in wanted)


def _count(series: Series, metric: str) -> int:
    """Of the series with most: a metric with labels has as many samples in each."""
    return max((len(s.values) for s in series.get(metric, ())), default=0)
