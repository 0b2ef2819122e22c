"""A rollout and its devices' samples -> evidence, wave by wave. Pure over what it is given.

A device gives evidence from when it serves the new release (and, in an earlier wave, from when the
present one began, so that what was judged before is not judged again) until it is sent back. Its
own samples from before it was assigned are the incumbent's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from remora_contract.device_phase import Phase
from remora_contract.gates import Gate
from remora_controller.gates.evaluate import DeviceEvidence, Samples, Series
from remora_controller.gates.judge import Verdict, WaveEvidence, judge, parsed
from remora_controller.gates.syntax import Measured, leaves, metrics_of
from remora_controller.rollout import MemberView, RolloutView, Standing, standing

BASELINE_S = 3600.0
BASELINE_SAMPLES = 48  # kept of each series: enough for a median, little to store
_SERVES = frozenset({Phase.SOAKING, Phase.COMMITTED})
_SWITCHED = _SERVES | {Phase.SWITCHING}
# (device, metric, since, until) -> its series
SamplesOf = Callable[[str, str, float, float], tuple[Samples, ...]]
Baselines = Mapping[str, Series]  # by device


def verdicts(
    view: RolloutView, samples_of: SamplesOf, baselines: Baselines, now: float
) -> tuple[Verdict, ...]:
    """Of every gate on every wave that has begun and somebody of which is there, in that order."""
    if not view.spec.gates:
        return ()
    found = []
    for wave in range(1, view.wave + 1):
        members = [m for m in view.members if m.wave == wave]
        if all(standing(m, view.spec, now) is Standing.APART for m in members):
            continue  # nobody came: there is nothing to judge, they are judged when they return
        evidence = wave_evidence(view, wave, members, samples_of, baselines, now)
        found += [judge(gate, evidence) for gate in view.spec.gates]
    return tuple(sorted(found, key=lambda v: _order(view, v)))


def _order(view: RolloutView, verdict: Verdict) -> tuple[int, int]:
    return view.spec.gates.index(verdict.gate), verdict.wave


def wave_evidence(
    view: RolloutView,
    wave: int,
    members: Sequence[MemberView],
    samples_of: SamplesOf,
    baselines: Baselines,
    now: float,
) -> WaveEvidence:
    standings = [(m, standing(m, view.spec, now)) for m in members]
    switched = [m for m in members if m.forward is not None and m.forward.phase in _SWITCHED]
    current = [m for m in switched if m.is_eligible and m.back is None]
    metrics = gate_metrics([view.spec.gates])
    return WaveEvidence(
        wave=wave,
        expected=sum(s not in (Standing.APART, Standing.FAILED) for _, s in standings),
        settled=sum(s in (Standing.SUCCEEDED, Standing.FAILED) for _, s in standings),
        failed=sum(s is Standing.FAILED for _, s in standings),
        activated=len(current),
        unreachable=sum(m.is_gone for m in current),
        devices=tuple(
            _device_evidence(m, view, metrics, samples_of, baselines, now) for m in current
        ),
    )


def _device_evidence(
    member: MemberView,
    view: RolloutView,
    metrics: frozenset[str],
    samples_of: SamplesOf,
    baselines: Baselines,
    now: float,
) -> DeviceEvidence:
    served_at = member.forward.served_at if member.forward is not None else None
    if served_at is None:
        return DeviceEvidence(member.device_id)
    since = max(served_at, view.clock_at)
    found = {m: samples_of(member.device_id, m, since, now + 1.0) for m in sorted(metrics)}
    return DeviceEvidence(member.device_id, found, baselines.get(member.device_id, {}))


def baseline_of(
    device_id: str, metrics: frozenset[str], samples_of: SamplesOf, now: float
) -> Series:
    """What the device measured until now, on the release that it is about to leave."""
    found = {m: samples_of(device_id, m, now - BASELINE_S, now) for m in sorted(metrics)}
    return {m: tuple(map(_shortened, series)) for m, series in found.items() if series}


def more_samples(one: Series, other: Series) -> bool:
    """Whether the first holds more than the other."""
    return _samples_in(one) > _samples_in(other)


def _samples_in(series: Series) -> int:
    return sum(len(s.values) for found in series.values() for s in found)


def _shortened(samples: Samples) -> Samples:
    if len(samples.values) <= BASELINE_SAMPLES:
        return samples
    share = BASELINE_SAMPLES / len(samples.values)
    base = samples.values[-BASELINE_SAMPLES - 1]
    return Samples(samples.values[-BASELINE_SAMPLES:], base, samples.span_s * share)


def gate_metrics(sets: Iterable[Sequence[Gate]]) -> frozenset[str]:
    """What the checks of these measure, now or before."""
    return frozenset(m for gates in sets for gate in gates for m in metrics_of(parsed(gate.check)))


def baseline_metrics(gates: Sequence[Gate]) -> frozenset[str]:
    """What they measure of incumbents."""
    return frozenset(
        leaf.metric
        for gate in gates
        for leaf, is_baseline in leaves(parsed(gate.check))
        if isinstance(leaf, Measured) and is_baseline
    )
