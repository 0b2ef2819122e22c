"""What an operator may ask of a rollout in which state, as a table. Pure."""

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
