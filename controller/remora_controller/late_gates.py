"""Does a release prove itself on a device that takes it after the waves? Pure.

Such a device is a wave of one: its gates are asked while it soaks and until they have evidence, and
it alone goes back when one fails. What counts failures (`failure_fraction`, `failed_devices`) looks
at all the late devices of the rollout together: failing, it sends back those that are still judged
and keeps the release from others.

    JUDGING --> PASSED | FAILED | SENT_BACK | INCONCLUSIVE | UNDONE | OVERTAKEN        (all final)
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from remora_contract.device_phase import Phase
from remora_contract.gates import Gate
from remora_controller.gates.evaluate import DeviceEvidence
from remora_controller.gates.judge import Outcome, Verdict, WaveEvidence, judge, parsed
from remora_controller.gates.syntax import (
    FAILED,
    FAILURE_FRACTION,
    UNREACHABLE,
    UNREACHABLE_FRACTION,
    Condition,
    Counted,
    leaves,
    metrics_of,
)
from remora_controller.phases import UNSUCCESSFUL
from remora_controller.rollout import Attempt

_SWITCHED = frozenset({Phase.SWITCHING, Phase.SOAKING, Phase.COMMITTED})


class LateState(Enum):
    JUDGING = "JUDGING"
    PASSED = "PASSED"
    FAILED = "FAILED"
    SENT_BACK = "SENT_BACK"
    INCONCLUSIVE = "INCONCLUSIVE"
    UNDONE = "UNDONE"
    OVERTAKEN = "OVERTAKEN"


# What somebody should know of; kept for the gauge while nothing was assigned since.
FLAGGED = (LateState.JUDGING, LateState.SENT_BACK, LateState.FAILED, LateState.INCONCLUSIVE)
LATE_ENDS: dict[LateState, str] = {
    LateState.PASSED: "it served through its soak and every gate passes",
    LateState.SENT_BACK: "a gate that says `rollback` fails: it gets what it ran before",
    LateState.FAILED: "a gate that says `pause` fails: it keeps the release, and that is said",
    LateState.INCONCLUSIVE: "gates lacked samples, or it was pinned or quarantined, for "
    "`--wave-timeout`: it keeps the release",
    LateState.UNDONE: "it refused the release, failed or went back by itself",
    LateState.OVERTAKEN: "it was assigned something else meanwhile",
}


@dataclass(frozen=True)
class LateGroup:
    """The devices that came late to one rollout; without those that were overtaken."""

    size: int = 0
    settled: int = 0
    failed: int = 0


@dataclass(frozen=True)
class LateView:
    """One device that is judged. `last_good` is what it committed before, None: nothing."""

    forward: Attempt
    newest_generation: int
    last_good: str | None
    is_barred: bool  # quarantined or pinned: nothing is done to it, its gates are not asked
    timeout_s: float
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class EndLate:
    state: LateState
    detail: str


@dataclass(frozen=True)
class SendBack:
    release_id: str | None
    detail: str


def judge_late(view: LateView, now: float) -> EndLate | SendBack | None:
    """None: not yet. What somebody decided later wins over whatever the gates say."""
    forward = view.forward
    if view.newest_generation != forward.generation:
        return EndLate(LateState.OVERTAKEN, "it was assigned something else meanwhile")
    if forward.phase is not None and forward.phase in UNSUCCESSFUL:
        return EndLate(LateState.UNDONE, f"the device ended it: {forward.phase.value}")
    if forward.served_at is None:
        return None
    if view.is_barred:
        return _barred(view, forward.served_at, now)
    failing = [v for v in view.verdicts if v.outcome is Outcome.FAIL]
    for verdict in sorted(failing, key=lambda v: v.gate.on_fail != "rollback"):
        why = f"gate {verdict.gate.name} fails: {verdict.gate.check}: {verdict.detail}"
        if verdict.gate.on_fail == "rollback":
            return SendBack(view.last_good, why)
        return EndLate(LateState.FAILED, why)
    return _without_failure(view, forward.served_at, now)


def _barred(view: LateView, served_at: float, now: float) -> EndLate | None:
    if now < served_at + view.timeout_s:
        return None
    why = f"it was pinned or quarantined, and its gates not asked, {view.timeout_s:.0f} s after it "
    return EndLate(LateState.INCONCLUSIVE, why + "began to serve")


def _without_failure(view: LateView, served_at: float, now: float) -> EndLate | None:
    lacking = [v for v in view.verdicts if v.outcome is Outcome.INCONCLUSIVE]
    is_soaked = view.forward.phase is Phase.COMMITTED
    if is_soaked and not lacking:
        said = "; ".join(f"{v.gate.name}: {v.detail}" for v in view.verdicts)
        return EndLate(LateState.PASSED, said)
    if now < served_at + view.timeout_s:
        return None
    missing = [f"gate {v.gate.name} has {v.detail}" for v in lacking]
    if not is_soaked:
        missing.append(f"its soak did not end within {view.timeout_s:.0f} s")
    return EndLate(LateState.INCONCLUSIVE, "; ".join(missing))


def asked_gates(gates: Sequence[Gate], *, has_incumbent: bool) -> tuple[Gate, ...]:
    """A device that ran nothing before has nothing to be compared with."""
    return tuple(
        gate
        for gate in gates
        if has_incumbent or not any(is_baseline for _, is_baseline in leaves(parsed(gate.check)))
    )


def late_verdicts(
    gates: Sequence[Gate],
    wave: int,
    phase: Phase | None,
    is_gone: bool,
    group: LateGroup,
    measured: DeviceEvidence,
) -> tuple[Verdict, ...]:
    """Of one device; its rollout's late devices stand in `group`, itself included."""
    switched = phase in _SWITCHED
    evidence = WaveEvidence(
        wave=wave,
        expected=1,
        settled=group.settled,
        failed=group.failed,
        activated=int(switched),
        unreachable=int(switched and is_gone),
        devices=(measured,) if switched else (),
    )
    together = WaveEvidence(wave, group.size, group.settled, group.failed)
    return tuple(judge(g, together if _only_counts_failures(g) else evidence) for g in gates)


def closed_reason(gates: Sequence[Gate], wave: int, group: LateGroup) -> str | None:
    """Why no further device gets the release after the waves; None: it may."""
    together = WaveEvidence(wave, group.size, group.settled, group.failed)
    for gate in gates:
        if _only_counts_failures(gate):
            verdict = judge(gate, together)
            if verdict.outcome is Outcome.FAIL:
                return (
                    f"gate {gate.name} fails on the devices that took it after the waves: "
                    f"{gate.check}: {verdict.detail}; roll out something better"
                )
    return None


def counts_failures(gates: Iterable[Gate]) -> bool:
    return any(_counted(parsed(gate.check)) & {FAILED, FAILURE_FRACTION} for gate in gates)


@functools.lru_cache(maxsize=256)
def _only_counts_failures(gate: Gate) -> bool:
    condition = parsed(gate.check)
    names = _counted(condition)
    return (
        bool(names)
        and not names & {UNREACHABLE, UNREACHABLE_FRACTION}
        and not metrics_of(condition)
    )


def _counted(condition: Condition) -> set[str]:
    return {leaf.name for leaf, _ in leaves(condition) if isinstance(leaf, Counted)}


def group_of(standings: Iterable[tuple[LateState, Phase | None, int]]) -> LateGroup:
    """`standings`: how many late devices of a rollout are in a state with a furthest phase."""
    size = settled = failed = 0
    for state, phase, count in standings:
        if state is LateState.OVERTAKEN:
            continue
        is_undone = state in (LateState.UNDONE, LateState.SENT_BACK) or phase in UNSUCCESSFUL
        size += count
        failed += count if is_undone else 0
        is_open = state is LateState.JUDGING and not is_undone and phase is not Phase.COMMITTED
        settled += 0 if is_open else count
    return LateGroup(size, settled, failed)
