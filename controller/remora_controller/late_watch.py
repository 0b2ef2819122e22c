"""Judges devices that took a release after its waves: fetches what they measured, asks
`late_gates`, carries out what it says.

What they measured is kept with the samples of open rollouts and filled from the store, all else is
read from there each time: a controller that was killed decides the same again. Runs on the store's
thread.
"""

from __future__ import annotations

import functools
import logging

from remora_contract.gates import Gate
from remora_controller.domain import Assignment, RolloutRecord, StoredEvent
from remora_controller.gates.collect import (
    baseline_metrics,
    baseline_of,
    gate_metrics,
    more_samples,
)
from remora_controller.gates.evaluate import DeviceEvidence, Series
from remora_controller.gates.judge import Verdict
from remora_controller.gates.samples import TOKENS
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
FILLED_AT_ONCE = 50  # devices a look: their history is read while Syncs wait


class LateWatch:
    def __init__(self, store: Store, presence: Presence) -> None:
        self._store = store
        self._presence = presence
        self._looked_at = float("-inf")
        self._groups: dict[str, LateGroup] = {}  # of this look
        self._filled: frozenset[str] = frozenset()  # those whose history is in memory
        self._whole: dict[tuple[str, str, int], Series] = {}  # baselines that grow no more
        self.judging: frozenset[str] = frozenset()  # devices whose samples are wanted soon

    def look(self, now: float) -> list[Assignment]:
        """The ways back that it assigned."""
        if 0 <= now - self._looked_at < LOOK_EVERY_S:
            return []
        self._looked_at = now
        self._groups.clear()
        members = self._store.late_members()
        rollouts = self._rollouts_of(members)
        filled = self._follow(members, rollouts)
        made = []
        for member in members:
            rollout = rollouts.get(member.rollout_id)
            if rollout is None or (member.device_id in self.judging - filled):
                continue
            action = judge_late(self._view(rollout, member, now), now)
            if isinstance(action, SendBack):
                made += self._send_back(rollout, member, action, now)
            elif action is not None:
                self._end(rollout, member, action, now)
        return made

    def _rollouts_of(self, members: list[LateMember]) -> dict[str, RolloutRecord]:
        found = [self._store.rollout(r) for r in sorted({m.rollout_id for m in members})]
        return {r.rollout_id: r for r in found if r is not None}

    def _follow(
        self, members: list[LateMember], rollouts: dict[str, RolloutRecord]
    ) -> frozenset[str]:
        """From now on keeps what devices measure by which they are judged. Those whose history is
        there: of many that come at once, a few at each look."""
        judged = {
            (m.rollout_id, m.device_id, m.forward.generation): m
            for m in members
            if not m.is_barred and m.newest_generation == m.forward.generation
        }
        wanted: dict[str, frozenset[str]] = {}
        for member in judged.values():
            rollout = rollouts.get(member.rollout_id)
            gates = () if rollout is None else _asked(rollout, member)
            if metrics := _metrics(gates):
                wanted[member.device_id] = metrics
        self.judging = frozenset(wanted)
        self._whole = {k: s for k, s in self._whole.items() if k in judged}
        self._filled &= self.judging
        self._filled |= set(sorted(self.judging - self._filled)[:FILLED_AT_ONCE])
        self._fill({d: wanted[d] for d in self._filled})
        return self._filled

    def _fill(self, wanted: dict[str, frozenset[str]]) -> None:
        """Of devices that are judged from now on, or by more than before."""
        new = sorted(self._presence.samples.want_of(wanted))
        if new:
            names = {TOKENS}.union(*(wanted[d] for d in new))
            stored = self._store.metric_samples(names, 0.0, new)
            # Asked behind `want_of`: what comes in between would be in neither.
            unsaved = [p for p in self._presence.unsaved_points() if p.device_id in new]
            self._presence.samples.fill([*stored, *unsaved])

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
        gates = _asked(rollout, member)
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
        keeper, metrics = self._presence.samples, _metrics(gates)
        found = {m: keeper.samples(member.device_id, m, since, now + 1.0) for m in metrics}
        return DeviceEvidence(member.device_id, found, self._baseline(member, gates, found))

    def _baseline(self, member: LateMember, gates: tuple[Gate, ...], found: Series) -> Series:
        """What the device measured in the last hour in which it told of the release before this
        one. That comes with several Syncs, oldest first: it is whole once the device tells what it
        measures since it serves (`found`), and until then the most that was known is kept."""
        metrics = baseline_metrics(gates)
        if not metrics:
            return {}
        key = (member.rollout_id, member.device_id, member.forward.generation)
        if key in self._whole:
            return self._whole[key]
        stored = self._store.baselines(member.rollout_id, member.device_id)
        known = stored.get(member.device_id, {})
        keeper, until = self._presence.samples, member.forward.assigned_at
        newest = keeper.newest_at(member.device_id, metrics, until)
        if newest is not None:
            last = min(until, newest + 1.0)
            measured = baseline_of(member.device_id, metrics, keeper.samples, last)
            if more_samples(measured, known):
                self._store.keep_baselines(member.rollout_id, {member.device_id: measured})
                known = measured
        if all(found.get(m) for m in metrics):
            self._whole[key] = known
        return known

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


def _asked(rollout: RolloutRecord, member: LateMember) -> tuple[Gate, ...]:
    return _asked_of(_gates(rollout), member.last_good is not None)


# Asked of every device at every look, and the same for all of a rollout.
@functools.lru_cache(maxsize=64)
def _asked_of(gates: tuple[Gate, ...], has_incumbent: bool) -> tuple[Gate, ...]:
    return asked_gates(gates, has_incumbent=has_incumbent)


@functools.lru_cache(maxsize=64)
def _metrics(gates: tuple[Gate, ...]) -> frozenset[str]:
    return gate_metrics([gates])


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
