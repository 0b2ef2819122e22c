"""A release in which an experiment's name means one of its arms: derived, never edited. Pure.

An experiment over adapters becomes an adapter of its name with the winner's bytes; one that has a
use case among its arms, or the name of a use case, becomes a use case. Everything else stays:
whoever asks for an arm's adapter by its own name is answered as before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from remora_contract.artifact import check_name
from remora_contract.digests import short
from remora_contract.errors import DocumentInvalid, NotFound, RequestInvalid
from remora_contract.experiments import ARM_PREFIX, SHADOW_PREFIX, Arm, Experiment
from remora_contract.gates import Gate, GateSet
from remora_contract.release import Release, ReleaseAdapter, ReleaseUseCase, WeightedName
from remora_controller.gates.judge import parsed
from remora_controller.gates.syntax import metrics_of


@dataclass(frozen=True)
class Promoted:
    """`notes`: what else changes with the name, for people."""

    release: Release
    notes: tuple[str, ...]


def declared(release: Release, name: str) -> Experiment:
    """Raises NotFound."""
    for experiment in release.experiments or ():
        if experiment.name == name:
            return experiment
    there = ", ".join(e.name for e in release.experiments or ()) or "none"
    raise NotFound(f"release {release.release_id} has no experiment {name} (there: {there})")


def promoted(release: Release, name: str, arm_name: str) -> Promoted:
    """Raises NotFound for an experiment or arm that is not there, RequestInvalid where the release
    cannot have the name."""
    experiment = declared(release, name)
    if arm_name not in [a.name for a in experiment.arms]:
        there = ", ".join(a.name for a in experiment.arms)
        raise NotFound(f"experiment {name} has no arm {arm_name} (there: {there})")
    rest = tuple(e for e in release.experiments or () if e.name != name)
    gates = _gates(release.gates, name, rest)
    notes = [*_gate_notes(release.gates, gates), *_name_notes(release, experiment, arm_name, rest)]
    bare = replace(release, experiments=rest or None, gates=gates)
    try:
        made = _named(bare, experiment, experiment.arm(arm_name))
    except ValueError as e:
        raise RequestInvalid(f"experiment {name} cannot become arm {arm_name}: {e}") from e
    return Promoted(made, tuple(notes))


def _named(release: Release, experiment: Experiment, arm: Arm) -> Release:
    if becomes_adapter(release, experiment):
        return replace(release, adapters=_adapters(release, experiment.name, str(arm.adapter)))
    mix = [u.adapters for u in release.use_cases if u.name == arm.use_case]
    made = ReleaseUseCase(experiment.name, mix[0] if mix else (WeightedName(str(arm.adapter)),))
    if any(u.name == experiment.name for u in release.use_cases):
        whole = tuple(made if u.name == made.name else u for u in release.use_cases)
    else:
        whole = (*release.use_cases, made)
    return replace(release, use_cases=whole)


def becomes_adapter(release: Release, experiment: Experiment) -> bool:
    """Else a use case."""
    name = experiment.name
    if any(a.name == name for a in release.adapters):
        return True
    is_taken = any(u.name == name for u in release.use_cases)
    return not is_taken and all(a.adapter for a in experiment.arms) and _is_artifact_name(name)


def _is_artifact_name(name: str) -> bool:
    try:
        check_name(name, "adapter name")
    except DocumentInvalid:
        return False
    return True


def _adapters(release: Release, name: str, winner_name: str) -> tuple[ReleaseAdapter, ...]:
    winner = next(a for a in release.adapters if a.name == winner_name)
    old = next((a for a in release.adapters if a.name == name), None)
    revision = winner.revision
    if old is not None and old.digest != winner.digest and old.revision == revision:
        # Devices know the name's revision as other bytes.
        revision = f"{revision[:100]}-{short(winner.digest)}"
    made = ReleaseAdapter(name, revision, winner.digest)
    if old is None:
        return (*release.adapters, made)
    same = old.digest == winner.digest
    return tuple(made if a.name == name and not same else a for a in release.adapters)


def without_arm_gates(gates: tuple[Gate, ...], name: str, is_last: bool) -> tuple[Gate, ...]:
    """Without those that measure what the experiment's arms count: nobody will. `is_last`: there
    is no other experiment that such a metric could be of."""
    return tuple(g for g in gates if not any(_is_gone(m, name, is_last) for m in _metrics(g)))


def _metrics(gate: Gate) -> frozenset[str]:
    return metrics_of(parsed(gate.check))


def _is_gone(metric: str, name: str, is_last: bool) -> bool:
    kind, _, label = metric.partition(".")
    if not kind.startswith((ARM_PREFIX, SHADOW_PREFIX)):
        return False
    return label.startswith(f"{name}/") or is_last


def _gates(gates: GateSet | None, name: str, rest: tuple[Experiment, ...]) -> GateSet | None:
    if gates is None:
        return None
    checks = without_arm_gates(gates.checks, name, not rest)
    return replace(gates, checks=checks) if checks or gates.golden else None


def _gate_notes(before: GateSet | None, after: GateSet | None) -> Iterator[str]:
    kept = after.checks if after is not None else ()
    for gate in before.checks if before is not None else ():
        if gate not in kept:
            yield f"gate {gate.name} goes: it measures arms of the experiment"


def _name_notes(
    release: Release, experiment: Experiment, arm_name: str, rest: tuple[Experiment, ...]
) -> Iterator[str]:
    """What else names an adapter that becomes other bytes."""
    name, winner = experiment.name, experiment.arm(arm_name).adapter
    digests = {a.name: a.digest for a in release.adapters}
    if name not in digests or winner is None or digests[winner] == digests[name]:
        return
    for use_case in release.use_cases:
        if any(a.name == name for a in use_case.adapters):
            yield f"use case {use_case.name} has adapter {name}: it changes too"
    for other in rest:
        for arm in other.arms:
            if name == arm.adapter or _mixes(release, arm.use_case, name):
                yield f"experiment {other.name}, arm {arm.name}: its counts begin anew"
    for question in release.gates.golden if release.gates else ():
        if question.use_case == name:
            yield f"golden question {question.name} is asked of what {name} becomes"


def _mixes(release: Release, use_case: str | None, adapter: str) -> bool:
    found = [u for u in release.use_cases if u.name == use_case]
    return any(a.name == adapter for u in found for a in u.adapters)
