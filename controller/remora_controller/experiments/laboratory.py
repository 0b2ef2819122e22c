"""What operators do with experiments: look at them, and make a winner what the name means.

A promotion is a release derived from the one that runs, and a rollout of it like any other:
planned, in waves, approved where that is asked for. Runs on the store's thread. Knows no gRPC.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from remora_contract.digests import canonical_json
from remora_contract.errors import Refused, RequestInvalid
from remora_contract.experiments import Experiment
from remora_contract.gates import Gate
from remora_contract.release import Release
from remora_contract.strict import loads, plain
from remora_controller.domain import Device, ReleaseRecord, StoredEvent
from remora_controller.experiments.overview import ExperimentView, labels_of, overview
from remora_controller.experiments.promotion import declared, promoted, without_arm_gates
from remora_controller.experiments.rules import candidate_of, concerning, refusal_of
from remora_controller.experiments.tally import Sum
from remora_controller.gates.judge import Verdict
from remora_controller.operations import Operations, RolloutDetail, StartRequest
from remora_controller.planner import Plan
from remora_controller.presence import Presence
from remora_controller.release_diff import Difference
from remora_controller.store.protocol import Store
from remora_controller.store.rows import dumps

log = logging.getLogger(__name__)
MAX_REASON = 500


@dataclass(frozen=True)
class PromotionRequest:
    """`start.release`: what to derive from; empty: what all the devices run."""

    name: str
    start: StartRequest
    arm: str | None = None
    force: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Proposal:
    """What a promotion would be. `refusal`: why it needs force; None: it may be."""

    experiment: Experiment
    arm: str
    base: Release
    release: Release
    verdicts: tuple[Verdict, ...]  # of the rules that concern the arm
    refusal: str | None
    notes: tuple[str, ...]


class Laboratory:
    def __init__(
        self,
        store: Store,
        operations: Operations,
        presence: Presence,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._operations = operations
        self._presence = presence
        self._clock = clock

    def experiments(self, selector: str, name: str, with_ended: bool) -> list[ExperimentView]:
        """Of releases that the devices run, or of all. Raises RequestInvalid for a selector that
        cannot be read, NotFound for its group."""
        devices = self._operations.devices(selector)
        running = Counter(d.report.running_release_id for d in devices)
        records = self._store.releases()
        releases = [document_of(r) for r in records if with_ended or r.release_id in running]
        found = overview(releases, running, self._sums(releases, devices))
        return [view for view in found if name in ("", view.experiment.name)]

    def _sums(self, releases: Iterable[Release], devices: Iterable[Device]) -> dict[str, Sum]:
        labels = {
            label
            for release in releases
            for arms in labels_of(release).values()
            for label in arms.values()
        }
        return self._presence.tally.sums(labels, [d.device_id for d in devices])

    def proposal(self, request: PromotionRequest) -> Proposal:
        """Raises NotFound, RequestInvalid, Refused where it is not clear what to derive from or
        which arm is meant."""
        devices = self._operations.devices(request.start.selector)
        base = self._base(request, devices)
        experiment = declared(base, request.name)
        arm = request.arm or candidate_of(experiment)
        if arm is None:
            arms = ", ".join(a.name for a in experiment.arms)
            raise Refused(
                f"experiment {request.name} has several arms that could win: --arm {arms}"
            )
        made = promoted(base, request.name, arm)
        (view,) = [
            v
            for v in overview([base], {}, self._sums([base], devices))
            if v.experiment.name == request.name
        ]
        names = {rule.name for rule in concerning(experiment, arm)}
        return Proposal(
            experiment,
            arm,
            base,
            made.release,
            tuple(v for v in view.verdicts if v.gate.name in names),
            refusal_of(experiment, arm, view.verdicts),
            made.notes,
        )

    def _base(self, request: PromotionRequest, devices: Sequence[Device]) -> Release:
        if request.start.release:
            return document_of(self._operations.release(request.start.release))
        running = Counter(d.report.running_release_id for d in devices)
        del running[""]
        if not running:
            raise Refused("no matching device runs a release yet")
        if len(running) > 1:
            there = "; ".join(f"{r}: {count} devices" for r, count in sorted(running.items()))
            raise Refused(
                f"the matching devices run different releases ({there}); narrow --selector, or say "
                "--from RELEASE"
            )
        return document_of(self._operations.release(next(iter(running))))

    def planned(self, request: PromotionRequest) -> tuple[Proposal, list[Difference], Plan]:
        """What would come of it; changes nothing. Raises what `proposal` raises, and what would
        refuse the derived release."""
        found = self.proposal(request)
        contents = self._operations.checked_contents(found.release)
        plan = self._operations.plan_of(contents, request.start.selector, request.start.spec)
        return found, self._operations.differences_of(found.base, found.release), plan

    def promote(self, request: PromotionRequest, by: str) -> tuple[Proposal, RolloutDetail]:
        """Creates the derived release and starts its rollout. Raises Refused unless the rules that
        concern the arm pass, or `force` says why not; and what `start` raises."""
        found = self.proposal(request)
        if len(request.reason) > MAX_REASON:
            raise RequestInvalid(f"a reason has at most {MAX_REASON} characters")
        if request.force and not request.reason.strip():
            raise RequestInvalid("--force needs a --reason: it is written to the audit log")
        if found.refusal is not None and not request.force:
            raise Refused(
                f"arm {found.arm} of experiment {request.name} is not promoted: {found.refusal}; "
                "wait, or promote it all the same with --force --reason WHY"
            )
        record = self._operations.create_release(canonical_json(found.release), by)
        detail = self._operations.start(replace(request.start, release=record.release_id), by)
        self._tell(found, detail, request, by)
        return found, detail

    def _tell(
        self, found: Proposal, detail: RolloutDetail, request: PromotionRequest, by: str
    ) -> None:
        whole = {
            "experiment": found.experiment.name,
            "arm": found.arm,
            "from": found.base.release_id,
            "release": found.release.release_id,
            "rollout": detail.record.rollout_id,
            "by": by,
            "forced": found.refusal if request.force else None,
            "reason": request.reason,
            "rules": [
                {"name": v.gate.name, "verdict": v.outcome.value, "numbers": dict(v.numbers)}
                for v in found.verdicts
            ],
        }
        log.info("experiment.promoted", extra=whole)
        event = StoredEvent(self._clock(), "", "experiment.promoted", dumps(plain(whole)))
        self._store.add_events([event])


def gates_after(gates: tuple[Gate, ...], found: Proposal) -> tuple[Gate, ...]:
    """A rollout's gates for the derived release: without those that measure its arms."""
    return without_arm_gates(gates, found.experiment.name, found.release.experiments is None)


@functools.lru_cache(maxsize=256)
def _document(release_id: str, document: bytes) -> Release:
    return loads(Release, document, release_id)


def document_of(record: ReleaseRecord) -> Release:
    return _document(record.release_id, record.document)
