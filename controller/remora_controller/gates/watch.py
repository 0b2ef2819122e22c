"""Judges the gates of open rollouts: fetches samples and baselines, asks `collect`, remembers the
answer for a few seconds, because a decision is made every second and samples come every ten.

Everything here is rebuilt from the store after a start. Runs on the store's thread; `samples` is
filled from the event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from remora_controller.domain import MetricPoint, RolloutRecord
from remora_controller.gates.collect import (
    BASELINE_S,
    baseline_metrics,
    baseline_of,
    gate_metrics,
    more_samples,
    verdicts,
)
from remora_controller.gates.judge import Verdict
from remora_controller.gates.samples import TOKENS, SampleKeeper
from remora_controller.rollout import Action, Assign, RolloutView
from remora_controller.store.protocol import Store

JUDGED_EVERY_S = 5.0
_REMEMBERED = 64  # rollouts


@dataclass(frozen=True)
class _Judged:
    of: int  # hash of what else than samples it was judged by
    at: float
    verdicts: tuple[Verdict, ...]


class GateWatch:
    def __init__(
        self, samples: SampleKeeper, unsaved_points: Callable[[], list[MetricPoint]] = list
    ) -> None:
        """`unsaved_points`: samples that wait to be stored."""
        self.samples = samples
        self._unsaved_points = unsaved_points
        self._judged: dict[str, _Judged] = {}
        self._whole: set[tuple[str, int, str]] = set()  # whose baseline was made whole

    def follow(self, store: Store, rollouts: Sequence[RolloutRecord], now: float) -> None:
        """From now on keeps what the gates of these rollouts look at."""
        metrics = gate_metrics(r.spec.gates for r in rollouts)
        new = self.samples.want(metrics)
        if new:
            names = {*new, TOKENS}
            stored = store.metric_samples(names, now - BASELINE_S)
            # Asked behind `want`: what comes in between would be in neither.
            self.samples.fill([*stored, *self._unsaved_points()])
        open_ids = {r.rollout_id for r in rollouts}
        self._judged = {r: j for r, j in self._judged.items() if r in open_ids}
        self._whole = {key for key in self._whole if key[0] in open_ids}

    def judged(self, store: Store, view: RolloutView, now: float) -> RolloutView:
        """The view with verdicts of its gates."""
        if not view.spec.gates:
            return view
        facts = hash((view.wave, view.clock_at, view.members))
        known = self._judged.get(view.rollout_id)
        if known is None or known.of != facts or not 0 <= now - known.at < JUDGED_EVERY_S:
            baselines = store.baselines(view.rollout_id) if _compares(view) else {}
            found = verdicts(view, self.samples.samples, baselines, now)
            known = _Judged(facts, now, found)
            if len(self._judged) < _REMEMBERED or view.rollout_id in self._judged:
                self._judged[view.rollout_id] = known
        return replace(view, verdicts=known.verdicts)

    def keep_baselines(
        self, store: Store, view: RolloutView, actions: Iterable[Action], now: float
    ) -> None:
        """Of devices about to be assigned: what they measured on the release that they leave."""
        if not _compares(view):
            return
        metrics = baseline_metrics(view.spec.gates)
        devices = [a.device_id for a in actions if isinstance(a, Assign) and not a.is_rollback]
        found = {d: baseline_of(d, metrics, self.samples.samples, now) for d in devices}
        kept = {d: series for d, series in found.items() if series}
        if kept:
            store.keep_baselines(view.rollout_id, kept)

    def make_baselines_whole(self, store: Store, view: RolloutView) -> None:
        """Of devices that serve now: what they measured before they were assigned came in part
        only with the Syncs that followed."""
        if not _compares(view):
            return
        serving = {
            (view.rollout_id, m.forward.generation, m.device_id): m.forward.assigned_at
            for m in view.members
            if m.forward is not None and m.forward.served_at is not None
        }
        new = {key: at for key, at in serving.items() if key not in self._whole}
        if not new:
            return
        known, metrics = store.baselines(view.rollout_id), baseline_metrics(view.spec.gates)
        found = {
            d: baseline_of(d, metrics, self.samples.samples, at) for (_, _, d), at in new.items()
        }
        kept = {d: s for d, s in found.items() if more_samples(s, known.get(d, {}))}
        if kept:
            store.keep_baselines(view.rollout_id, kept)
        self._whole.update(new)


def _compares(view: RolloutView) -> bool:
    return bool(baseline_metrics(view.spec.gates))
