"""Writes docs/states.md from the code: how devices and rollouts move from state to state.

    python -m scripts.state_reference [--check]

`--check` exits 1 when the page has drifted.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from remora_agent.control.phase import NEXT as DEVICE
from remora_agent.control.phase import RESUMABLE, UNTOUCHABLE, Event
from remora_contract.device_phase import FINAL, Phase
from remora_controller.domain import RolloutState
from remora_controller.gates.judge import Outcome
from remora_controller.late_gates import LATE_ENDS
from remora_controller.phases import ORDER
from remora_controller.sharing.tickets import NEXT as TICKETS
from remora_controller.sharing.tickets import Event as Happening
from remora_controller.transitions import BY_ITSELF, Request
from remora_controller.transitions import NEXT as ROLLOUT
from scripts.markdown import table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "states.md"
_EVENTS = {
    Event.ADMITTED: "nothing forbids it",
    Event.REFUSED: "this device cannot run it",
    Event.ALREADY_SERVING: "it is what serves",
    Event.STARTED: "the next step is written down",
    Event.DONE: "done",
    Event.WINDOW_OPENED: "window open, no lock",
    Event.SOAKED: "healthy for the whole soak",
    Event.UNHEALTHY: "unhealthy",
    Event.FAILED: "failed",
    Event.INTERRUPTED: "the agent started again",
    Event.CRASH_LOOP: "three abnormal exits",
}
# What a wave does about a gate: failing at any time, or when the wave has ended.
_GATES = {
    Outcome.PASS: "goes on",
    Outcome.FAIL: "stops at once: `on_fail: pause` pauses, `on_fail: rollback` rolls back",
    Outcome.INCONCLUSIVE: "waits up to `--wave-timeout` at the wave's end, then pauses",
}


_TICKETS = {
    Happening.CLAIMED: "a device asks, and is to build it (again: it renews its lease)",
    Happening.ENDED: "the attempt gave nothing that others can use, or the bytes went",
    Happening.SPENT: "likewise, and it was the last of three attempts",
    Happening.UPLOADED: "the builder has uploaded it, whole and verified",
    Happening.FORGIVEN: "a day has passed",
}


def page() -> str:
    return f"""# States

Written from the code by `python -m scripts.state_reference`; `make lint` fails when it drifts. What
the states mean for an operator is in [rollouts.md](rollouts.md).

## A device, for each assignment

{_device()}

"Touched" says whether what serves is being changed: a newer assignment waits until that is over. A
phase that resumes goes on where it was when the agent starts again; the others go back. Reports are
counted in the order of the table: the furthest phase of a generation wins, however late or often it
is told.

## A rollout, asked by an operator

{_asked()}

## A rollout, by itself

{_by_itself()}

## A gate

{table(("verdict", "the rollout"), ((o.value, text) for o, text in _GATES.items()))}

## A device that takes a release after its waves

JUDGING leads to one of these, and each is an end:

{table(("state", "when"), ((state.value, when) for state, when in LATE_ENDS.items()))}

## An engine that devices share, by build key and circle

{_tickets()}

A builder that was silent for `engine_lease_s` is replaced. Who waited for `engine_wait_s`
builds for itself; [engines.md](engines.md) says the rest.
"""


def _tickets() -> str:
    rows = [(at.value, _TICKETS[event], to.value) for (at, event), to in TICKETS.items()]
    return table(("state", "what happens", "leads to"), rows)


def _device() -> str:
    rows = []
    for phase in ORDER:
        leads = {event: to for (at, event), to in DEVICE.items() if at is phase}
        restart = leads.pop(Event.INTERRUPTED, None)
        moves = "; ".join(f"{_EVENTS[e]}: {to.value}" for e, to in leads.items())
        rows.append((phase.value, moves or _ending(phase), _restart(phase, restart), _touch(phase)))
    return table(("phase", "leads to", "after a restart", "touched"), rows)


def _ending(phase: Phase) -> str:
    return "(end)" if phase in FINAL else ""


def _restart(phase: Phase, to: Phase | None) -> str:
    if phase in RESUMABLE:
        return "resumes"
    return "" if to is None else to.value


def _touch(phase: Phase) -> str:
    return "yes" if phase in UNTOUCHABLE else ""


def _asked() -> str:
    head = ("state", *(r.value for r in Request))
    rows = [
        (s.value, *(ROLLOUT[s, r].value if (s, r) in ROLLOUT else "" for r in Request))
        for s in RolloutState
    ]
    return table(head, rows)


def _by_itself() -> str:
    rows = [
        (at.value, to.value, when) for at, found in BY_ITSELF.items() for to, when in found.items()
    ]
    return table(("from", "to", "when"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    fresh = page()
    if not parser.parse_args().check:
        PAGE.write_text(fresh)
    elif PAGE.read_text() != fresh:
        sys.exit("docs/states.md has drifted: run python -m scripts.state_reference")


if __name__ == "__main__":
    main()
