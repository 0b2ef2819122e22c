"""Who builds the engine of one build key, for everybody in its scope: a state table, and what is
answered to those who ask. Pure; owns no clock and no store.

One ticket a key and scope. It names at most one builder, who holds a lease: whoever asks after the
lease has passed takes over. Nobody waits longer than `Limits.wait_s`, counted from the first time
that he was told to wait; after `Limits.attempts` attempts that gave no usable engine, everybody
builds alone for `Limits.given_up_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from remora_contract.errors import InternalFault, Refused

MAX_WHY = 300
_MAX_REJECTED = 16


class State(Enum):
    FREE = "FREE"  # nobody builds it, none is there
    BUILDING = "BUILDING"
    READY = "READY"
    GIVEN_UP = "GIVEN_UP"  # too many attempts failed


class Event(Enum):
    CLAIMED = "claimed"
    ENDED = "ended"  # without an engine that others can use; another may try
    SPENT = "spent"  # likewise, and it was the last try
    UPLOADED = "uploaded"
    FORGIVEN = "forgiven"  # enough time has passed


S, E = State, Event
NEXT: dict[tuple[State, Event], State] = {
    (S.FREE, E.CLAIMED): S.BUILDING,
    (S.BUILDING, E.CLAIMED): S.BUILDING,  # renewed
    (S.BUILDING, E.ENDED): S.FREE,
    (S.BUILDING, E.SPENT): S.GIVEN_UP,
    (S.BUILDING, E.UPLOADED): S.READY,
    (S.READY, E.ENDED): S.FREE,  # a device rejected it
    (S.READY, E.SPENT): S.GIVEN_UP,
    (S.GIVEN_UP, E.FORGIVEN): S.FREE,
}


@dataclass(frozen=True)
class Limits:
    lease_s: float = 60.0
    wait_s: float = 1800.0
    build_s: float = 7200.0  # a builder that renews for longer is lost all the same
    attempts: int = 3
    given_up_s: float = 86_400.0

    @property
    def ask_again_s(self) -> float:
        """Several times within a lease, so that a free one is soon found."""
        return min(15.0, max(0.25, self.lease_s / 4))


@dataclass(frozen=True)
class SharedEngine:
    digest: str
    bytes: int
    built_by: str
    built_at: float


@dataclass(frozen=True)
class Ticket:
    state: State = State.FREE
    builder: str = ""  # while BUILDING
    began_at: float = 0.0
    lease_until: float = 0.0
    engine: SharedEngine | None = None  # while READY
    failed: int = 0  # attempts that ended without an engine others can use
    bad: int = 0  # of them: engines that a device rejected
    why: str = ""  # the last of them did
    given_up_at: float = 0.0
    rejected: tuple[str, ...] = field(default=())  # digests that nobody gets any more


@dataclass(frozen=True)
class Build:
    lease_s: float
    why: str


@dataclass(frozen=True)
class Fetch:
    engine: SharedEngine


@dataclass(frozen=True)
class Wait:
    builder: str
    left_s: float  # at most


@dataclass(frozen=True)
class Alone:
    why: str


Answer = Build | Fetch | Wait | Alone


def ask(
    ticket: Ticket, device: str, now: float, waiting_since: float | None, limits: Limits
) -> tuple[Ticket, Answer]:
    """What `device` does next. `waiting_since`: when it was first told to wait for this key."""
    ticket, overrun = _settled(ticket, device, now, limits)
    if overrun:
        return ticket, Alone(ticket.why)
    if ticket.state is State.READY and ticket.engine is not None:
        return ticket, Fetch(ticket.engine)
    if ticket.state is State.GIVEN_UP:
        tries = f"{ticket.failed} attempts gave no engine to share; the last: {ticket.why}"
        return ticket, Alone(tries)
    if ticket.state is State.BUILDING and ticket.builder != device:
        left = limits.wait_s - (0.0 if waiting_since is None else max(0.0, now - waiting_since))
        if left <= 0:
            return ticket, Alone(f"waited {limits.wait_s:.0f} s for {ticket.builder}")
        return ticket, Wait(ticket.builder, left)
    return _claimed(ticket, device, now, limits)


def may_upload(ticket: Ticket, device: str) -> bool:
    """Also after the lease has passed, as long as nobody took over."""
    return ticket.state is State.BUILDING and ticket.builder == device


def stored_of(ticket: Ticket, device: str) -> str | None:
    """Digest of what this device has uploaded and is ready: it may not have heard of it."""
    engine = ticket.engine if ticket.state is State.READY else None
    return engine.digest if engine is not None and engine.built_by == device else None


def renewed(ticket: Ticket, now: float, limits: Limits) -> Ticket:
    return replace(ticket, lease_until=max(ticket.lease_until, now + limits.lease_s))


def given_up(
    ticket: Ticket, device: str, blames_model: bool, why: str, now: float, limits: Limits
) -> Ticket:
    """The builder's attempt has ended. Of anybody else, and said twice, it changes nothing."""
    if not may_upload(ticket, device):
        return ticket
    return _ended(ticket, f"{device}: {why}", now, limits, counts=blames_model)


def uploaded(ticket: Ticket, device: str, engine: SharedEngine) -> Ticket:
    """Raises Refused when the device does not hold the lease, or those bytes were rejected."""
    if stored_of(ticket, device) == engine.digest:
        return ticket
    check_upload(ticket, device, engine.digest)
    moved = _moved(ticket, Event.UPLOADED)
    return replace(moved, builder="", lease_until=0.0, engine=engine)


def check_upload(ticket: Ticket, device: str, digest: str) -> None:
    """Raises Refused: only the lease's holder uploads, and nothing that a device rejected."""
    if not may_upload(ticket, device):
        who = ticket.builder or "nobody"
        raise Refused(f"{device} does not hold the lease for this engine ({who} does): not stored")
    if digest in ticket.rejected:
        raise Refused(f"a device rejected just these bytes before ({ticket.why}): not stored")


def rejected(
    ticket: Ticket, device: str, digest: str, why: str, now: float, limits: Limits
) -> Ticket:
    """A device fetched the engine and does not use it. Of another engine it changes nothing."""
    if ticket.state is not State.READY or ticket.engine is None or ticket.engine.digest != digest:
        return ticket
    bad = (*ticket.rejected, digest)[-_MAX_REJECTED:]
    text = f"{device} rejected the engine of {ticket.engine.built_by}: {why}"
    ended = _ended(ticket, text, now, limits, counts=True)
    return replace(ended, bad=ticket.bad + 1, rejected=bad)


def evicted(ticket: Ticket) -> Ticket:
    """Its bytes went, through no fault of theirs."""
    if ticket.state is not State.READY:
        return ticket
    return replace(_moved(ticket, Event.ENDED), engine=None)


def _settled(ticket: Ticket, device: str, now: float, limits: Limits) -> tuple[Ticket, bool]:
    """The ticket once what time has ended is ended; whether it was the asking device's own build
    that took too long."""
    if ticket.state is State.GIVEN_UP and now >= ticket.given_up_at + limits.given_up_s:
        return replace(_moved(ticket, Event.FORGIVEN), failed=0), False
    if ticket.state is not State.BUILDING:
        return ticket, False
    if now >= ticket.began_at + limits.build_s:
        why = f"{ticket.builder} built for more than {limits.build_s:.0f} s"
        return _ended(ticket, why, now, limits, counts=True), ticket.builder == device
    if now >= ticket.lease_until and ticket.builder != device:
        why = f"{ticket.builder} was lost while it built"
        return _ended(ticket, why, now, limits, counts=True), False
    return ticket, False


def _claimed(ticket: Ticket, device: str, now: float, limits: Limits) -> tuple[Ticket, Build]:
    is_new = ticket.state is State.FREE
    moved = _moved(ticket, Event.CLAIMED)
    if is_new:
        moved = replace(moved, builder=device, began_at=now, lease_until=now + limits.lease_s)
    why = "nobody of its class has built it yet"
    if ticket.why:
        why = f"another attempt: {ticket.why}"
    return renewed(moved, now, limits), Build(limits.lease_s, why)


def _ended(ticket: Ticket, why: str, now: float, limits: Limits, *, counts: bool) -> Ticket:
    failed = ticket.failed + (1 if counts else 0)
    is_last = failed >= limits.attempts
    moved = _moved(ticket, Event.SPENT if is_last else Event.ENDED)
    return replace(
        moved,
        builder="",
        lease_until=0.0,
        engine=None,
        failed=failed,
        why=why[:MAX_WHY],
        given_up_at=now if is_last else 0.0,
    )


def _moved(ticket: Ticket, event: Event) -> Ticket:
    try:
        return replace(ticket, state=NEXT[ticket.state, event])
    except KeyError:
        raise InternalFault(
            f"event {event.value!r} is impossible for an engine's ticket in {ticket.state.value}"
        ) from None
