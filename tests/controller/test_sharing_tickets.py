"""Who builds a shared engine: one live lease, lost builders replaced, nobody waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remora_controller.sharing.tickets import (
    Build,
    Limits,
    SharedEngine,
    State,
    Ticket,
    Wait,
    ask,
    given_up,
    rejected,
    uploaded,
)

LIMITS = Limits(lease_s=10, wait_s=100, build_s=60, attempts=3, given_up_s=1000)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ask", "fail", "upload", "reject"]), st.integers(0, 3), st.floats(0, 30)
    ),
    max_size=60,
)


@given(STEPS)
def test_at_most_one_lease_lives_and_replays_change_nothing(steps):
    ticket, now, lease = Ticket(), 0.0, None  # lease: (device, until)
    for what, number, passed in steps:
        now, device = now + passed, f"d{number}"
        if what == "ask":
            ticket, answer = ask(ticket, device, now, None, LIMITS)
            if isinstance(answer, Build):
                assert lease is None or lease[0] == device or now >= lease[1] or now >= lease[2]
                lease = (device, ticket.lease_until, ticket.began_at + LIMITS.build_s)
        elif what == "fail":
            before, ticket = ticket, given_up(ticket, device, True, "no", now, LIMITS)
            assert given_up(ticket, device, True, "no", now, LIMITS) == ticket
            lease = lease if before == ticket else None
        elif what == "upload" and ticket.builder == device:
            engine = SharedEngine(f"e{now}", 1, device, now)
            ticket, lease = uploaded(ticket, device, engine), None
            assert uploaded(ticket, device, engine) == ticket
        elif what == "reject" and ticket.engine is not None:
            digest = ticket.engine.digest
            ticket = rejected(ticket, device, digest, "bad", now, LIMITS)
            assert digest in ticket.rejected and ticket.engine is None
        assert (ticket.state is State.BUILDING) == bool(ticket.builder)


@given(st.floats(0, 300))
def test_a_waiter_is_let_go_at_its_bound_whoever_builds(waited):
    ticket = Ticket(State.BUILDING, "d1", began_at=290, lease_until=1e9)
    _, answer = ask(ticket, "d2", 300.0, 300.0 - waited, LIMITS)
    assert isinstance(answer, Wait) == (waited < LIMITS.wait_s)
