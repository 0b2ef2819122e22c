"""What a rollout does next: `decide(view, now) -> actions`. Pure, and the whole of it.

The view is loaded from the store each time, so a controller that was killed between any two
writes decides the same again. Owns no clock and no memory of its own.

    RUNNING --all waves done--> COMPLETED
       |  \\--successes can no longer reach the threshold--> ROLLING_BACK --> ROLLED_BACK
       |  \\--a gate fails--> ROLLING_BACK or PAUSED, as it says
       |  \\--nobody answers in time, gates lack evidence--> PAUSED (inconclusive)
       \\--abort--> ABORTING --> ABORTED        (transitions.py has what operators may ask)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from remora_contract.device_phase import FINAL, Phase
from remora_controller.domain import RolloutSpec, RolloutState
from remora_controller.gates.judge import Outcome, Verdict
from remora_controller.phases import UNSUCCESSFUL

_ROUNDING = 1e-9
# A rollout that paused itself never goes on without evidence.
_NOBODY_CAME = (
    "inconclusive: no device of waves 1 to {} came in time; resume waits for them once more"
)
_NOBODY_LEFT = (
    "inconclusive: every device of waves 1 to {} was removed, quarantined or relabelled; abort, "
    "and start again with those that are left"
)


@dataclass(frozen=True)
class Attempt:
    """An assignment this rollout gave and the furthest phase reported for it (None: no answer)."""

    generation: int
    assigned_at: float
    phase: Phase | None
    is_nothing: bool = False  # assigned no release at all: the device drops what is unfinished
    served_at: float | None = None  # when it was first heard to serve what it was assigned

    @property
    def is_settled(self) -> bool:
        return self.phase in FINAL


@dataclass(frozen=True)
class MemberView:
    """`is_gone` is surer than not `is_online`: right after a start nobody is either."""

    device_id: str
    wave: int
    forward: Attempt | None
    back: Attempt | None
    last_good: str | None  # release to go back to; None: it never committed one
    is_eligible: bool  # not removed or quarantined; while untouched, also matching the selector
    is_online: bool
    is_gone: bool


@dataclass(frozen=True)
class RolloutView:
    rollout_id: str
    release_id: str
    state: RolloutState
    reason: str  # why it is in that state
    keep: bool
    wave: int
    waves: int
    clock_at: float
    spec: RolloutSpec
    members: tuple[MemberView, ...]  # in wave order
    verdicts: tuple[Verdict, ...] = ()  # of every gate on every wave that has begun
    accepted_wave: int = 0  # up to it an operator goes on whatever gates say


@dataclass(frozen=True)
class Assign:
    device_id: str
    release_id: str | None
    is_rollback: bool


@dataclass(frozen=True)
class AdvanceWave:
    wave: int


@dataclass(frozen=True)
class SetState:
    state: RolloutState
    reason: str


Action = Assign | AdvanceWave | SetState


class Standing(Enum):
    WAITING = "waiting"  # to be assigned
    CHANGING = "changing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    APART = "apart"  # offline, quarantined, removed: neither success nor failure


def standing(member: MemberView, spec: RolloutSpec, now: float) -> Standing:
    """How a device counts for its wave.

    A device that was offline when its turn came, or that never answered, is set apart. One that
    began to change and vanished holds the wave until the timeout and then counts as failed.
    """
    attempt = member.forward
    if attempt is None:
        return Standing.APART if member.is_gone or not member.is_eligible else Standing.WAITING
    if attempt.is_settled:
        return Standing.FAILED if attempt.phase in UNSUCCESSFUL else Standing.SUCCEEDED
    if not member.is_eligible:
        return Standing.APART
    has_answered = attempt.phase is not None
    if _is_overdue(attempt, spec, now):
        if attempt.phase is Phase.WAIT_WINDOW:
            return Standing.APART  # ready, and held by its window or a lock: it follows later
        return Standing.FAILED if has_answered or member.is_online else Standing.APART
    return Standing.APART if member.is_gone and not has_answered else Standing.CHANGING


def decide(view: RolloutView, now: float) -> list[Action]:
    """Empty when there is nothing to do until a report, an operator or time changes something."""
    if view.state is RolloutState.RUNNING:
        return _forward(view, now)
    if view.state is RolloutState.ABORTING and view.keep:
        return _let_finish(view, now)
    if view.state in (RolloutState.ABORTING, RolloutState.ROLLING_BACK):
        return _back(view, now)
    return []


def _forward(view: RolloutView, now: float) -> list[Action]:
    if view.spec.not_before is not None and now < view.spec.not_before:
        return []
    begun = [(m, standing(m, view.spec, now)) for m in view.members if m.wave <= view.wave]
    for wave in range(1, view.wave + 1):
        reason = _stop_reason([s for m, s in begun if m.wave == wave], view, wave)
        if reason is not None:
            return [SetState(RolloutState.ROLLING_BACK, reason)]
    stopping = _gate_stop(view)
    if stopping is not None:
        return [stopping]
    standings = [s for _, s in begun]
    if Standing.WAITING in standings:
        ready = [m for m, s in begun if s is Standing.WAITING and m.is_online]
        return [
            Assign(m.device_id, view.release_id, False) for m in ready[: _free_slots(view, now)]
        ]
    if Standing.CHANGING in standings:
        return []
    return _wave_done(view, begun, now)


def _stop_reason(standings: Sequence[Standing], view: RolloutView, wave: int) -> str | None:
    counted = sum(s is not Standing.APART for s in standings)
    failed = sum(s is Standing.FAILED for s in standings)
    if not failed or counted - failed >= view.spec.success_threshold * counted - _ROUNDING:
        return None
    return (
        f"{failed} of {counted} devices of wave {wave} failed; "
        f"{view.spec.success_threshold:.0%} had to succeed"
    )


def _gate_stop(view: RolloutView) -> SetState | None:
    """What a gate that fails asks for; going back wins over a pause."""
    failing = [v for v in _counting(view, view.verdicts) if v.outcome is Outcome.FAIL]
    failing.sort(key=lambda v: v.gate.on_fail != "rollback")
    if not failing:
        return None
    first = failing[0]
    reason = f"gate {first.gate.name} fails on wave {first.wave}: {first.gate.check}: "
    if first.gate.on_fail == "rollback":
        return SetState(RolloutState.ROLLING_BACK, reason + first.detail)
    advice = "; abort, or go on with resume --accept-gates"
    return SetState(RolloutState.PAUSED, reason + first.detail + advice)


def _counting(view: RolloutView, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Without those of waves that an operator accepted as they are."""
    return [v for v in verdicts if v.wave > view.accepted_wave]


def _gates_open(view: RolloutView, now: float) -> list[Action] | None:
    """What a wave that has ended does instead of going on; None when its gates let it."""
    of_wave = [v for v in view.verdicts if v.wave == view.wave]
    lacking = [v for v in _counting(view, of_wave) if v.outcome is Outcome.INCONCLUSIVE]
    if not lacking:
        return None
    if now < view.clock_at + view.spec.wave_timeout_s:
        return []
    named = "; ".join(f"gate {v.gate.name} has {v.detail}" for v in lacking)
    advice = "resume waits once more, resume --accept-gates goes on"
    reason = f"inconclusive: wave {view.wave}: {named}; {advice}"
    return [SetState(RolloutState.PAUSED, reason)]


def _wave_done(
    view: RolloutView, begun: Sequence[tuple[MemberView, Standing]], now: float
) -> list[Action]:
    succeeded = sum(s is Standing.SUCCEEDED for _, s in begun)
    if not succeeded:
        if not any(m.is_eligible for m, _ in begun):
            return [SetState(RolloutState.PAUSED, _NOBODY_LEFT.format(view.wave))]
        if now < view.clock_at + view.spec.wave_timeout_s:
            return []
        return [SetState(RolloutState.PAUSED, _NOBODY_CAME.format(view.wave))]
    held = _gates_open(view, now)
    if held is not None:
        return held
    if view.wave < view.waves:
        return [AdvanceWave(view.wave + 1)]
    apart = [m for m, s in begun if s is Standing.APART]
    parts = [f"{succeeded} succeeded"]
    if away := sum(m.is_eligible for m in apart):
        parts.append(f"{away} offline get it when they return")
    if gone := len(apart) - away:
        parts.append(f"{gone} removed, quarantined or relabelled")
    return [SetState(RolloutState.COMPLETED, "; ".join(parts))]


def _free_slots(view: RolloutView, now: float) -> int:
    """How many more devices may change now; whoever was assigned and has not settled counts."""
    if view.spec.max_unavailable is None:
        return len(view.members)
    changing = sum(_is_changing(m, view.spec, now) for m in view.members)
    return max(0, view.spec.max_unavailable - changing)


def _is_changing(member: MemberView, spec: RolloutSpec, now: float) -> bool:
    attempt = member.back or member.forward
    if attempt is None or attempt.is_settled or attempt.is_nothing or not member.is_eligible:
        return False
    if member.back is not None and member.is_gone and attempt.phase is None:
        return False  # sent back while away: it changes when it returns, nobody waits for it
    return not _is_overdue(attempt, spec, now)


def _is_overdue(attempt: Attempt, spec: RolloutSpec, now: float) -> bool:
    return now >= attempt.assigned_at + spec.wave_timeout_s


def _let_finish(view: RolloutView, now: float) -> list[Action]:
    """Abort that keeps: nobody new is touched, whoever is changing may finish."""
    if any(_awaited(m, m.back or m.forward, view.spec, now) for m in view.members):
        return []
    return [SetState(RolloutState.ABORTED, "stopped by an operator; devices keep what they run")]


def _back(view: RolloutView, now: float) -> list[Action]:
    touched = [m for m in view.members if m.forward is not None and m.is_eligible]
    due = [m for m in touched if m.back is None]
    if due:
        # A device in the midst of a change, or away, is sent back at once: that makes no more
        # devices unavailable. Those that serve well again wait for a slot.
        at_once = [m for m in due if not _serves_well(m)]
        orderly = [m for m in due if _serves_well(m)]
        chosen = at_once + orderly[: _free_slots(view, now)]
        return [Assign(m.device_id, m.last_good, True) for m in chosen]
    if any(_awaited(m, m.back, view.spec, now) for m in touched):
        return []
    final = (
        RolloutState.ABORTED if view.state is RolloutState.ABORTING else RolloutState.ROLLED_BACK
    )
    cause = f"{view.reason}; " if view.reason else ""
    return [SetState(final, cause + _back_summary(touched))]


def _serves_well(member: MemberView) -> bool:
    return member.is_online and member.forward is not None and member.forward.is_settled


def _awaited(member: MemberView, attempt: Attempt | None, spec: RolloutSpec, now: float) -> bool:
    if attempt is None or attempt.is_settled or not member.is_eligible or member.is_gone:
        return False
    return not _is_overdue(attempt, spec, now)


def _back_summary(touched: Sequence[MemberView]) -> str:
    if not touched:
        return "no device was touched"
    restored = sum(m.back is not None and m.back.phase is Phase.COMMITTED for m in touched)
    kept = sum(m.back is not None and m.back.is_nothing for m in touched)
    parts = [f"{restored} of {len(touched)} devices confirmed their last good release"]
    if kept:
        parts.append(f"{kept} had no earlier release to return to and keep what they run")
    if open_ := len(touched) - restored - kept:
        parts.append(f"{open_} have not confirmed it")
    return "; ".join(parts)
