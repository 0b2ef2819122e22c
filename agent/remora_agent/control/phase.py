"""Events of the device state machine and where they lead, as a table. Pure; knows no effect.

A pair that is missing from NEXT is impossible: `advance` raises. `activation` decides what to do in
a phase, this table only says where an event leads.
"""

from __future__ import annotations

from enum import Enum

from remora_contract.device_phase import FINAL, Phase
from remora_contract.errors import InternalFault


class Event(Enum):
    ADMITTED = "admitted"  # nothing forbids it here
    REFUSED = "refused"  # this device cannot run it
    ALREADY_SERVING = "already_serving"  # what is assigned is what is committed and serves
    STARTED = "started"  # intent of the next effect is persisted
    DONE = "done"  # the effect of this phase happened
    WINDOW_OPENED = "window_opened"
    SOAKED = "soaked"  # healthy for the whole soak time
    UNHEALTHY = "unhealthy"  # while soaking
    FAILED = "failed"  # the effect of this phase did not happen
    INTERRUPTED = "interrupted"  # the agent started again and found this phase
    CRASH_LOOP = "crash_loop"  # what serves after a start took the agent down again and again


P, E = Phase, Event
# Nothing that serves has been touched yet: an interruption resumes where it was.
RESUMABLE = frozenset(
    {
        P.ASSIGNED,
        P.ADMITTED,
        P.STAGING,
        P.STAGED,
        P.BUILDING,
        P.BUILT,
        P.PROVING,
        P.WAIT_WINDOW,
    }
)
# Any newer assignment waits until these end: what serves is changing right now.
UNTOUCHABLE = frozenset({P.SWITCHING, P.REVERTING})

NEXT: dict[tuple[Phase, Event], Phase] = {
    (P.ASSIGNED, E.ADMITTED): P.ADMITTED,
    (P.ASSIGNED, E.REFUSED): P.REFUSED,
    (P.ASSIGNED, E.ALREADY_SERVING): P.COMMITTED,
    (P.ADMITTED, E.STARTED): P.STAGING,
    (P.STAGING, E.DONE): P.STAGED,
    (P.STAGING, E.FAILED): P.FAILED,
    (P.STAGED, E.STARTED): P.BUILDING,
    (P.BUILDING, E.DONE): P.BUILT,
    (P.BUILDING, E.FAILED): P.FAILED,
    (P.BUILT, E.STARTED): P.PROVING,
    (P.PROVING, E.DONE): P.WAIT_WINDOW,
    (P.PROVING, E.FAILED): P.FAILED,
    (P.WAIT_WINDOW, E.WINDOW_OPENED): P.SWITCHING,
    (P.SWITCHING, E.DONE): P.SOAKING,
    (P.SWITCHING, E.FAILED): P.REVERTING,
    (P.SOAKING, E.SOAKED): P.COMMITTED,
    (P.SOAKING, E.UNHEALTHY): P.REVERTING,
    (P.REVERTING, E.DONE): P.REVERTED,
    (P.REVERTING, E.FAILED): P.FAILED,
    **{(p, E.INTERRUPTED): p for p in RESUMABLE},
    (P.SWITCHING, E.INTERRUPTED): P.REVERTING,
    (P.SOAKING, E.INTERRUPTED): P.REVERTING,
    (P.REVERTING, E.INTERRUPTED): P.REVERTING,
    **{(p, E.CRASH_LOOP): P.REVERTING for p in Phase if p in FINAL},
    (P.REVERTING, E.CRASH_LOOP): P.REVERTING,
}


def next_phase(phase: Phase, event: Event) -> Phase:
    """Raises InternalFault for a pair the table does not have."""
    try:
        return NEXT[phase, event]
    except KeyError:
        raise InternalFault(f"event {event.value!r} is impossible in phase {phase.value}") from None
