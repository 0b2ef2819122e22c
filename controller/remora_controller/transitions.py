"""Into which states a rollout goes: asked by an operator, and by itself, as tables. Pure.

When it goes there by itself is `rollout.decide`'s; that it goes nowhere else, its tests'.
"""

from __future__ import annotations

from enum import Enum

from remora_contract.errors import Refused
from remora_controller.domain import RolloutState


class Request(Enum):
    PAUSE = "pause"
    RESUME = "resume"
    ABORT = "abort"
    APPROVE = "approve"
    SUPERSEDE = "supersede"


S, R = RolloutState, Request
NEXT: dict[tuple[RolloutState, Request], RolloutState] = {
    (S.RUNNING, R.PAUSE): S.PAUSED,
    (S.PAUSED, R.RESUME): S.RUNNING,
    (S.AWAITING_APPROVAL, R.APPROVE): S.RUNNING,
    **{(s, R.ABORT): S.ABORTING for s in S if not s.is_final},
    **{(s, R.SUPERSEDE): S.SUPERSEDED for s in S if not s.is_final},
}

BY_ITSELF: dict[RolloutState, dict[RolloutState, str]] = {
    S.RUNNING: {
        S.COMPLETED: "all waves have succeeded and their gates pass",
        S.ROLLING_BACK: "a wave can no longer succeed, or a gate that says `rollback` fails",
        S.PAUSED: (
            "a gate that says `pause` fails; or there is no evidence: nobody of the waves so far "
            "answered in time, nobody is left, or a gate lacks samples"
        ),
    },
    S.ABORTING: {S.ABORTED: "nobody is changing any more, or nobody is heard of in time"},
    S.ROLLING_BACK: {S.ROLLED_BACK: "the same"},
}


def requested(state: RolloutState, request: Request, rollout_id: str) -> RolloutState:
    """The state the request leads to. Raises Refused saying what would be possible."""
    try:
        return NEXT[state, request]
    except KeyError:
        possible = [r.value for r in Request if (state, r) in NEXT and r is not R.SUPERSEDE]
        advice = f"you can {' or '.join(possible)} it" if possible else "start a new rollout"
        raise Refused(
            f"rollout {rollout_id} is {state.value}: {request.value} is not possible; {advice}"
        ) from None
