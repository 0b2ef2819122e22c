"""What the device does next with an assignment: pure decisions over one persisted record.

`assign`, `advance` and `decide` are the whole machine. Owns no clock, disk or thread: the record
comes in, the next record or action comes out, and `reconcile` persists the one before it performs
the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from remora_agent.control.phase import UNTOUCHABLE, Event, next_phase
from remora_contract.device_phase import FINAL, Phase
from remora_contract.errors import Conflict

# Abnormal exits that a release may cost before the device stops serving it by itself.
MAX_ABNORMAL_EXITS = 3
# Runs in a row that ended while a release was built or proven: more, because power may well fail
# during a long build.
MAX_CUT_WORK = 4
_RISKY = frozenset({Phase.BUILDING, Phase.PROVING})
_HELD_POLL_S = 1.0  # windows open and locks end without telling


@dataclass(frozen=True)
class Desired:
    """One assignment as the controller sent it; `release_json` is not yet trusted.

    `release_id` None: nothing is assigned, the device keeps what it runs."""

    generation: int
    release_id: str | None
    release_json: str
    rollout_id: str
    soak_s: float
    is_rollback: bool
    download_bytes_per_s: int | None = None
    shares_bandwidth: bool = False  # with all that fetch for the rollout at once


@dataclass(frozen=True)
class Record:
    """Everything a restart needs. `committed` is what serves after a restart, `previous` what
    served before it; both are release ids. `entered_at_s` is on the clock given to `advance`."""

    desired: Desired
    phase: Phase
    entered_at_s: float
    committed: str | None = None
    previous: str | None = None
    error_code: str = ""
    error_message: str = ""
    cut_runs: int = 0  # in a row that ended in this phase without warning


class Effect(Enum):
    """Work with an outcome: DONE or FAILED (ADMIT: ADMITTED, REFUSED or ALREADY_SERVING)."""

    ADMIT = "admit"
    STAGE = "stage"
    BUILD = "build"
    PROVE = "prove"
    SWITCH = "switch"
    REVERT = "revert"


@dataclass(frozen=True)
class Perform:
    effect: Effect


@dataclass(frozen=True)
class Advance:
    """Bookkeeping only: persist this event, then decide again."""

    event: Event


@dataclass(frozen=True)
class WaitUntil:
    """Watch the health of serving until then (on the clock given to `decide`)."""

    at_s: float


@dataclass(frozen=True)
class Idle:
    pass


Action = Perform | Advance | WaitUntil | Idle

_EFFECTS = {
    Phase.ASSIGNED: Effect.ADMIT,
    Phase.STAGING: Effect.STAGE,
    Phase.BUILDING: Effect.BUILD,
    Phase.PROVING: Effect.PROVE,
    Phase.SWITCHING: Effect.SWITCH,
    Phase.REVERTING: Effect.REVERT,
}
_STEPS = {
    Phase.ADMITTED: Event.STARTED,
    Phase.STAGED: Event.STARTED,
    Phase.BUILT: Event.STARTED,
    Phase.WAIT_WINDOW: Event.WINDOW_OPENED,
}


def assign(record: Record | None, desired: Desired, now_s: float) -> Record:
    """The record of a new assignment; what is committed stays committed. Raises Conflict while a
    switch or revert is under way (assign again when it has ended), and for an old generation.

    An assignment of nothing drops what was unfinished. A release that soaks may end its soak first:
    where nothing is assigned there is nothing to go back to either."""
    phase = Phase.ASSIGNED if desired.release_id is not None else Phase.UNASSIGNED
    if record is None:
        return Record(desired, phase, now_s)
    soaks_on = phase is Phase.UNASSIGNED and record.phase is Phase.SOAKING
    if record.phase in UNTOUCHABLE or soaks_on:
        raise Conflict(f"generation {record.desired.generation} is {record.phase.value} right now")
    if desired.generation <= record.desired.generation:
        raise Conflict(
            f"generation {desired.generation} is not newer than {record.desired.generation}"
        )
    return Record(desired, phase, now_s, record.committed, record.previous)


def advance(
    record: Record, event: Event, now_s: float, code: str = "", message: str = ""
) -> Record:
    """The record after the event. Raises InternalFault when the event is impossible here."""
    phase = next_phase(record.phase, event)
    cut_runs = record.cut_runs if phase is record.phase else 0
    moved = replace(record, phase=phase, entered_at_s=now_s, cut_runs=cut_runs)
    if code and (event is Event.CRASH_LOOP or not moved.error_code):
        moved = replace(moved, error_code=code, error_message=message)
    if phase is Phase.COMMITTED:
        return _commit(moved)
    if event is Event.CRASH_LOOP:
        return replace(moved, committed=record.previous, previous=None)
    return moved


def decide(
    record: Record | None, now_s: float, unhealthy: str | None = None, is_held: bool = False
) -> Action:
    """What to do in this phase. `unhealthy` says why serving is not well while soaking, `is_held`
    that a release which is ready must not switch now (`holds`)."""
    if record is None or record.phase in FINAL:
        return Idle()
    if record.phase in _EFFECTS:
        return Perform(_EFFECTS[record.phase])
    if record.phase is Phase.WAIT_WINDOW and is_held:
        return WaitUntil(now_s + _HELD_POLL_S)
    if record.phase in _STEPS:
        return Advance(_STEPS[record.phase])
    if unhealthy is not None:
        return Advance(Event.UNHEALTHY)
    soaked_at_s = record.entered_at_s + record.desired.soak_s
    return Advance(Event.SOAKED) if now_s >= soaked_at_s else WaitUntil(soaked_at_s)


def counted(record: Record) -> Record:
    """The record that a run found which ended without warning: work that takes the agent or its
    machine down is not begun again and again."""
    return replace(record, cut_runs=record.cut_runs + 1) if record.phase in _RISKY else record


def after_start(record: Record | None, abnormal_exits: int) -> Event | None:
    """The event with which a starting agent meets the record it finds.

    A crash loop is met where the committed release is all that runs. Where the work of a newer one
    goes on too, either may be to blame, and none is given up."""
    if record is None:
        return None
    if record.cut_runs >= MAX_CUT_WORK:
        return Event.FAILED
    is_alone = record.phase in FINAL or record.phase is Phase.REVERTING
    if abnormal_exits >= MAX_ABNORMAL_EXITS and is_alone and record.committed is not None:
        return Event.CRASH_LOOP
    return None if record.phase in FINAL else Event.INTERRUPTED


def _commit(record: Record) -> Record:
    release_id = record.desired.release_id
    if release_id == record.committed:
        return record
    return replace(record, committed=release_id, previous=record.committed)
