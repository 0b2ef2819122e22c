"""Promotion by the controller itself: `promote_when: pass` of an experiment whose rules all pass.

It acts once for each rollout of an experiment: on the newest of a selector, once that has COMPLETED
and as long as nobody gave its devices something else since. Whatever is rolled out there
afterwards, by whomever and however it ends, is newer, so a promotion that went back is not tried
again. Runs on the store's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from remora_contract.errors import DocumentInvalid, Refused, RemoraError
from remora_contract.experiments import Experiment
from remora_contract.release import Release
from remora_controller.audit import AuditDraft
from remora_controller.audited import audited
from remora_controller.domain import Assignment, Device, RolloutRecord, RolloutState, StoredEvent
from remora_controller.experiments.laboratory import (
    Laboratory,
    PromotionRequest,
    document_of,
    gates_after,
)
from remora_controller.operations import Operations, StartRequest
from remora_controller.store.protocol import Store
from remora_controller.store.rows import dumps

log = logging.getLogger(__name__)
BY = "controller"
CALL = "PromoteExperiment"
LOOKED_AT = 200  # rollouts, newest first: reading a thousand would take 1 % of a core
HELD_S = 300.0  # after something stood in the way
_SHOWN = 5


@dataclass(frozen=True)
class _Case:
    rollout: RolloutRecord
    release: Release
    experiment: Experiment


class AutoPromotion:
    def __init__(
        self,
        store: Store,
        operations: Operations,
        laboratory: Laboratory,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._operations = operations
        self._laboratory = laboratory
        self._clock = clock
        self._held: dict[tuple[str, str], float] = {}  # release, experiment: until when
        self._told: dict[tuple[str, str], str] = {}  # why it is held, as it was told

    def tick(self) -> bool:
        """Whether a rollout was started."""
        rollouts = self._store.rollouts(LOOKED_AT)
        newest = newest_completed(rollouts)
        self._forget_all_but({r.release_id for r in newest})
        started = False
        for rollout in newest:
            for case in self._cases(rollout):
                started |= self._tried(case, rollouts)
        return started

    def _forget_all_but(self, release_ids: set[str]) -> None:
        self._held = {k: until for k, until in self._held.items() if k[0] in release_ids}
        self._told = {k: why for k, why in self._told.items() if k[0] in release_ids}

    def _cases(self, rollout: RolloutRecord) -> list[_Case]:
        record = self._store.release(rollout.release_id)
        if record is None:
            return []
        try:
            release = document_of(record)
        except DocumentInvalid as e:  # of a newer controller
            self._hold((rollout.release_id, ""), str(e))
            return []
        declared = [e for e in release.experiments or () if e.promote_when is not None]
        return [_Case(rollout, release, experiment) for experiment in declared]

    def _tried(self, case: _Case, rollouts: list[RolloutRecord]) -> bool:
        key = (case.release.release_id, case.experiment.name)
        if self._clock() < self._held.get(key, 0.0):
            return False
        try:
            return self._consider(case, rollouts)
        except RemoraError as e:
            self._hold(key, str(e))
            return False

    def _consider(self, case: _Case, rollouts: list[RolloutRecord]) -> bool:
        request = _request(case)
        found = self._laboratory.proposal(request)
        if found.refusal is not None:
            return False
        if any(_is_later(r, case.rollout, found.release.release_id) for r in rollouts):
            return False
        devices = self._operations.devices(case.rollout.selector)
        moved = moved_since(case.rollout, devices, self._store.assignments())
        if moved:
            raise Refused(
                f"{len(moved)} devices of {case.rollout.selector!r} were assigned other releases "
                f"since ({', '.join(moved[:_SHOWN])}): promote by hand, or start it there again"
            )
        spec = replace(request.start.spec, gates=gates_after(case.rollout.spec.gates, found))
        self._promote(replace(request, start=replace(request.start, spec=spec)))
        return True

    def _promote(self, request: PromotionRequest) -> None:
        """As an operator's call is: written down before and after. Raises what `promote` raises."""
        self._laboratory.planned(request)  # so that what is refused is no change
        detail = {"name": request.name, "release": request.start.release, "why": "promote_when"}
        draft = AuditDraft(self._clock(), BY, "", "", CALL, dumps(detail))
        with audited(self._store, draft, self._clock):
            self._laboratory.promote(request, BY)

    def _hold(self, key: tuple[str, str], why: str) -> None:
        """Told once, not every few seconds."""
        self._held[key] = self._clock() + HELD_S
        if self._told.get(key) == why:
            return
        self._told[key] = why
        release, experiment = key
        detail = {"release": release, "experiment": experiment, "reason": why}
        log.warning("experiment.held", extra=detail)
        event = StoredEvent(self._clock(), "", "experiment.held", dumps(detail))
        self._store.add_events([event])


def newest_completed(rollouts: Iterable[RolloutRecord]) -> list[RolloutRecord]:
    """Of each selector the newest rollout, where it has completed. `rollouts` are newest first."""
    newest: dict[str, RolloutRecord] = {}
    for rollout in rollouts:
        newest.setdefault(rollout.selector, rollout)
    return [r for r in newest.values() if r.state is RolloutState.COMPLETED]


def moved_since(
    rollout: RolloutRecord, devices: Iterable[Device], assignments: Mapping[str, Assignment]
) -> list[str]:
    """Devices of the selector, but for those that rollouts leave alone, which somebody gave
    something else since the rollout began. Those that it missed are no reason to wait."""
    newest = {
        d.device_id: assignments[d.device_id]
        for d in devices
        if d.pin is None and d.quarantine is None and d.device_id in assignments
    }
    return [
        device_id
        for device_id, assignment in newest.items()
        if assignment.release_id != rollout.release_id
        and assignment.created_at >= rollout.created_at
    ]


def _is_later(rollout: RolloutRecord, than: RolloutRecord, release_id: str) -> bool:
    """Of that release: of a part of the devices, or of more than these."""
    return rollout.release_id == release_id and rollout.created_at > than.created_at


def _request(case: _Case) -> PromotionRequest:
    rollout = case.rollout
    start = StartRequest(
        rollout.release_id,
        rollout.selector,
        replace(rollout.spec, not_before=None),
        needs_approval=rollout.needs_approval,
    )
    return PromotionRequest(case.experiment.name, start)
