"""Carries decisions out: loads views from the store, asks `rollout.decide`, applies what it says.

Runs on the store's thread. All state is in the store; this can be killed between any two writes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from remora_contract.errors import InvalidInput, NotFound
from remora_controller.domain import (
    Assignment,
    Device,
    RolloutRecord,
    RolloutState,
    StoredEvent,
)
from remora_controller.gates.watch import GateWatch
from remora_controller.groups import bind_live
from remora_controller.late import Completed, missed_rollout
from remora_controller.late_watch import LateWatch
from remora_controller.planner import Contents, device_refusals
from remora_controller.presence import Presence
from remora_controller.rollout import MemberView, RolloutView, SetState, decide
from remora_controller.selector import Selector
from remora_controller.store.protocol import MemberState, Store
from remora_controller.store.rows import dumps

log = logging.getLogger(__name__)
# Advancing a wave, completing it, stopping: a few decisions follow from each other at most.
_MAX_STEPS = 16
ContentsOf = Callable[[str], Contents]


class RolloutDriver:
    def __init__(self, store: Store, presence: Presence, contents_of: ContentsOf) -> None:
        """`contents_of(release_id)` raises NotFound when an artifact is no longer published."""
        self._store = store
        self._presence = presence
        self._contents_of = contents_of
        self._gates = GateWatch(presence.samples, presence.unsaved_points)
        self._late: set[str] = set()
        self._late_watch = LateWatch(store, presence)
        self.is_moving = False  # a rollout ran at the last tick
        self._told: dict[str, str] = {}  # late devices refused: device -> release

    def check_late(self, device_ids: Iterable[str]) -> None:
        """These devices may have missed a rollout: look at the next tick."""
        self._late.update(device_ids)

    def tick(self, now: float) -> list[Assignment]:
        """Everything there is to do now; returns the new assignments, so that devices are poked."""
        made: list[Assignment] = []
        rollouts = self._store.open_rollouts()
        self.is_moving = any(r.state is RolloutState.RUNNING for r in rollouts)
        self._gates.follow(self._store, rollouts, now)
        for rollout in rollouts:
            made += self._drive(rollout, now)
        return made + self._late_watch.look(now) + self._assign_late(now)

    def wants_samples(self, device_id: str) -> bool:
        """Whether gates wait for what the device measures."""
        return self.is_moving or device_id in self._late_watch.judging

    def _drive(self, rollout: RolloutRecord, now: float) -> list[Assignment]:
        made: list[Assignment] = []
        for _ in range(_MAX_STEPS):
            view = load_view(self._store, self._presence, rollout, now)
            self._gates.make_baselines_whole(self._store, view)
            actions = decide(self._gates.judged(self._store, view, now), now)
            if not actions:
                break
            self._gates.keep_baselines(self._store, view, actions, now)
            applied = self._store.apply(rollout, actions, now)
            if applied is not None:
                made += applied
                self._tell(rollout, [a for a in actions if isinstance(a, SetState)], now)
            current = self._store.rollout(rollout.rollout_id)
            if current is None or current.state.is_final:
                self._late.update(self._presence.online(now))
                break
            rollout = current
        return made

    def _tell(self, rollout: RolloutRecord, changes: list[SetState], now: float) -> None:
        for change in changes:
            detail = {
                "rollout": rollout.rollout_id,
                "state": change.state.value,
                "reason": change.reason,
            }
            log.info("rollout.state", extra=detail)
            self._store.add_events([StoredEvent(now, "", "rollout.state", dumps(detail))])

    def _assign_late(self, now: float) -> list[Assignment]:
        if not self._late:
            return []
        completed = self._completed()
        busy = self._in_open_rollouts()
        made = []
        for device_id in sorted(self._late - busy) if completed else []:
            device = self._store.device(device_id)
            if device is None or not _may_be_assigned(device):
                continue
            assignment = self._assign_one(device, completed, now)
            if assignment is not None:
                made.append(assignment)
        self._late.clear()  # only now: whoever a full disk kept waiting is looked at again
        return made

    def _completed(self) -> list[Completed]:
        rollouts = self._store.completed_rollouts()
        groups = self._store.groups()
        return [Completed(r, bind_live(r.selector, groups)) for r in rollouts]

    def _in_open_rollouts(self) -> set[str]:
        open_ = self._store.open_rollouts()
        return {s.member.device_id for r in open_ for s in self._store.member_states(r.rollout_id)}

    def _assign_one(
        self, device: Device, completed: list[Completed], now: float
    ) -> Assignment | None:
        newest = self._store.assignment(device.device_id)
        rollout = missed_rollout(device, newest, completed)
        if rollout is None:
            return None
        reason = self._late_watch.closed_reason(rollout)
        if reason is None:
            reason = self._late_refusal(device, rollout.release_id)
        if reason is not None:
            self._tell_refused(device, rollout, reason, now)
            return None
        self._told.pop(device.device_id, None)
        return self._store.assign_late(device.device_id, rollout, now)

    def _late_refusal(self, device: Device, release_id: str) -> str | None:
        try:
            refusals = device_refusals(device, self._contents_of(release_id))
        except (NotFound, InvalidInput) as e:
            return str(e)
        return "; ".join(map(str, refusals)) or None

    def _tell_refused(
        self, device: Device, rollout: RolloutRecord, reason: str, now: float
    ) -> None:
        """Once per device and release, not once per Sync."""
        if self._told.get(device.device_id) == rollout.release_id:
            return
        self._told[device.device_id] = rollout.release_id
        detail = {"release": rollout.release_id, "reason": reason}
        event = StoredEvent(now, device.device_id, "device.left_out", dumps(detail))
        self._store.add_events([event])


def _may_be_assigned(device: Device) -> bool:
    return device.removed_at is None and device.quarantine is None and device.pin is None


def load_view(store: Store, presence: Presence, rollout: RolloutRecord, now: float) -> RolloutView:
    selector = bind_live(rollout.selector, store.groups())
    states = store.member_states(rollout.rollout_id)
    return RolloutView(
        rollout_id=rollout.rollout_id,
        release_id=rollout.release_id,
        state=rollout.state,
        reason=rollout.reason,
        keep=rollout.keep,
        wave=rollout.wave,
        waves=rollout.waves,
        clock_at=rollout.clock_at,
        spec=rollout.spec,
        members=tuple(member_view(s, selector, presence, now) for s in states),
        accepted_wave=rollout.accepted_wave,
    )


def member_view(
    state: MemberState, selector: Selector, presence: Presence, now: float
) -> MemberView:
    device_id = state.member.device_id
    is_touched = state.forward is not None
    return MemberView(
        device_id=device_id,
        wave=state.member.wave,
        forward=state.forward,
        back=state.back,
        last_good=state.last_good,
        is_eligible=not state.is_barred
        and (is_touched or selector.matches(device_id, state.labels)),
        is_online=presence.is_online(device_id, now),
        is_gone=presence.is_gone(device_id, now),
    )
