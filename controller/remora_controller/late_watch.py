"""Judges devices that took a release after its waves: fetches what they measured, asks
`late_gates`, carries out what it says.

Everything is read from the store each time, so a controller that was killed decides the same again.
Runs on the store's thread.
"""

from __future__ import annotations

import logging

from remora_contract.gates import Gate
from remora_controller.domain import Assignment, RolloutRecord, StoredEvent
from remora_controller.gates.collect import BASELINE_S, baseline_metrics, baseline_of, gate_metrics
from remora_controller.gates.evaluate import DeviceEvidence, Series
from remora_controller.gates.judge import Verdict
from remora_controller.gates.samples import TOKENS, SampleKeeper
from remora_controller.late_gates import (
    EndLate,
    LateGroup,
    LateState,
    LateView,
    SendBack,
    asked_gates,
    closed_reason,
    counts_failures,
    group_of,
    judge_late,
    late_verdicts,
)
from remora_controller.presence import Presence
from remora_controller.store.late import LateMember
from remora_controller.store.protocol import Store
from remora_controller.store.rows import dumps

log = logging.getLogger(__name__)
LOOK_EVERY_S = 2.0
# What it measured while it was away comes with several Syncs, and is stored seconds later.
BASELINE_SETTLED_S = 15.0


class LateWatch:
    def __init__(self, store: Store, presence: Presence) -> None:
        self._store = store
        self._presence = presence
        self._looked_at = float("-inf")
        self._groups: dict[str, LateGroup] = {}  # of this look
        self.judging: frozenset[str] = frozenset()  # devices whose samples are wanted soon

    def look(self, now: float) -> list[Assignment]:
        """The ways back that it assigned."""
        if 0 <= now - self._looked_at < LOOK_EVERY_S:
            return []
        self._looked_at = now
        self._groups.clear()
        made, judging = [], set()
        rollouts: dict[str, RolloutRecord] = {}
        for member in self._store.late_members():
            rollout = rollouts.get(member.rollout_id) or self._store.rollout(member.rollout_id)
            if rollout is None:
                continue
            rollouts[member.rollout_id] = rollout
            action = judge_late(self._view(rollout, member, now), now)
            if action is None:
                judging.add(member.device_id)
            elif isinstance(action, SendBack):
                made += self._send_back(rollout, member, action, now)
            else:
                self._end(rollout, member, action, now)
        self.judging = frozenset(judging)
        return made

    def closed_reason(self, rollout: RolloutRecord) -> str | None:
        """Why the rollout's release goes to no further device, as it stood at the last look."""
        gates = _gates(rollout)
        if not counts_failures(gates):
            return None
        return closed_reason(gates, rollout.waves, self._group(rollout))

    def _group(self, rollout: RolloutRecord) -> LateGroup:
        known = self._groups.get(rollout.rollout_id)
        if known is None:
            known = group_of(self._store.late_standings(rollout.rollout_id))
            self._groups[rollout.rollout_id] = known
        return known

    def _view(self, rollout: RolloutRecord, member: LateMember, now: float) -> LateView:
        gates = asked_gates(_gates(rollout), has_incumbent=member.last_good is not None)
        serves_since = member.forward.served_at
        verdicts: tuple[Verdict, ...] = ()
        if gates and serves_since is not None and not member.is_barred:
            verdicts = late_verdicts(
                gates,
                rollout.waves,
                member.forward.phase,
                self._presence.is_gone(member.device_id, now),
                self._group(rollout) if counts_failures(gates) else LateGroup(),
                self._evidence(member, gates, serves_since, now),
            )
        return LateView(
            forward=member.forward,
            newest_generation=member.newest_generation,
            last_good=member.last_good,
            is_barred=member.is_barred,
            timeout_s=rollout.spec.wave_timeout_s,
            verdicts=verdicts,
        )

    def _evidence(
        self, member: LateMember, gates: tuple[Gate, ...], since: float, now: float
    ) -> DeviceEvidence:
        metrics = gate_metrics([gates])
        if not metrics:
            return DeviceEvidence(member.device_id)
        keeper = self._history(member.device_id, metrics, since)
        found = {m: keeper.samples(member.device_id, m, since, now + 1.0) for m in metrics}
        is_settled = now >= since + BASELINE_SETTLED_S
        before = self._baseline(member, gates) if is_settled else {}
        return DeviceEvidence(member.device_id, found, before)

    def _history(self, device_id: str, metrics: frozenset[str], since: float) -> SampleKeeper:
        keeper = SampleKeeper()
        keeper.want(metrics)
        names = {*metrics, TOKENS}
        keeper.fill(self._store.metric_samples(names, since - BASELINE_S, device_id))
        return keeper

    def _baseline(self, member: LateMember, gates: tuple[Gate, ...]) -> Series:
        """What the device measured in the last hour in which it told of the release before this
        one; kept from the first time on, because history is short."""
        metrics = baseline_metrics(gates)
        if not metrics:
            return {}
        known = self._store.baselines(member.rollout_id, member.device_id).get(member.device_id)
        if known is not None:
            return known
        until = member.forward.assigned_at
        points = self._store.metric_samples(metrics, 0.0, member.device_id)
        newest = max((p.at for p in points if p.at < until), default=until)
        keeper = self._history(member.device_id, metrics, min(until, newest + 1.0))
        found = baseline_of(member.device_id, metrics, keeper.samples, min(until, newest + 1.0))
        if found:
            self._store.keep_baselines(member.rollout_id, {member.device_id: found})
        return found

    def _send_back(
        self, rollout: RolloutRecord, member: LateMember, action: SendBack, now: float
    ) -> list[Assignment]:
        kept = "" if action.release_id else "; there is no earlier release: it keeps what it runs"
        detail = action.detail + kept
        event = _event(rollout, member, LateState.SENT_BACK, detail, now)
        made = self._store.send_late_back(member, rollout, action.release_id, detail, event)
        if made is None:
            return []
        log.warning("device.late", extra={"device": member.device_id, "why": detail})
        return [made]

    def _end(self, rollout: RolloutRecord, member: LateMember, action: EndLate, now: float) -> None:
        is_news = action.state is not LateState.OVERTAKEN and bool(_gates(rollout))
        event = _event(rollout, member, action.state, action.detail, now) if is_news else None
        self._store.end_late(member, action.state, action.detail, event)


def _gates(rollout: RolloutRecord) -> tuple[Gate, ...]:
    """Those of the last wave, unless an operator accepted it whatever they say."""
    return () if rollout.accepted_wave >= rollout.waves else rollout.spec.gates


def _event(
    rollout: RolloutRecord, member: LateMember, state: LateState, detail: str, now: float
) -> StoredEvent:
    said = {
        "rollout": rollout.rollout_id,
        "release": rollout.release_id,
        "state": state.value,
        "detail": detail,
    }
    return StoredEvent(now, member.device_id, "device.late", dumps(said))
