"""Experiments of releases with what their arms counted and what their rules say. Pure.

Releases that declare a name with arms of the same identities are one experiment here: other shares
count on, other bytes are another experiment whose counts begin anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from remora_contract.experiments import Arm, Experiment
from remora_contract.release import Release, arm_identities
from remora_controller.experiments.rules import judge_rules
from remora_controller.experiments.tally import Sum
from remora_controller.gates.judge import Verdict


@dataclass(frozen=True)
class ArmView:
    arm: Arm
    identity: str
    sum: Sum


@dataclass(frozen=True)
class ExperimentView:
    """`experiment` as the newest of the releases declares it; `running`: devices that run one."""

    experiment: Experiment
    release_ids: tuple[str, ...]
    running: int
    arms: tuple[ArmView, ...]
    verdicts: tuple[Verdict, ...]


@dataclass
class _Group:
    experiment: Experiment
    identities: dict[str, str]
    release_ids: list[str]


def labels_of(release: Release) -> dict[str, dict[str, str]]:
    """By experiment, then by arm: EXPERIMENT/ARM/IDENTITY, as devices tell it."""
    digests = {a.name: a.digest for a in release.adapters}
    return {
        experiment.name: {
            arm: f"{experiment.name}/{arm}/{identity}"
            for arm, identity in arm_identities(
                experiment, release.bundle, digests, release.use_cases
            ).items()
        }
        for experiment in release.experiments or ()
    }


def overview(
    releases: Iterable[Release], running: Mapping[str, int], sums: Mapping[str, Sum]
) -> list[ExperimentView]:
    """By name, then newest first, as `releases` are. `running`: devices by release id; `sums` by
    label."""
    groups: dict[tuple[str, ...], _Group] = {}
    for release in releases:
        labels = labels_of(release)
        for experiment in release.experiments or ():
            own = labels[experiment.name]
            group = groups.setdefault(
                (experiment.name, *sorted(own.values())), _Group(experiment, own, [])
            )
            group.release_ids.append(release.release_id)
    found = [_view(group, running, sums) for group in groups.values()]
    return sorted(found, key=lambda view: view.experiment.name)


def _view(group: _Group, running: Mapping[str, int], sums: Mapping[str, Sum]) -> ExperimentView:
    arms = tuple(_arm_view(arm, group.identities[arm.name], sums) for arm in group.experiment.arms)
    return ExperimentView(
        group.experiment,
        tuple(group.release_ids),
        sum(running.get(r, 0) for r in group.release_ids),
        arms,
        verdicts_of(group.experiment, arms),
    )


def _arm_view(arm: Arm, label: str, sums: Mapping[str, Sum]) -> ArmView:
    return ArmView(arm, label.rpartition("/")[2], sums.get(label, Sum(0, {})))


def verdicts_of(experiment: Experiment, arms: Sequence[ArmView]) -> tuple[Verdict, ...]:
    return judge_rules(experiment, {view.arm.name: view.sum.counts for view in arms})
