"""Who gives way to whom: single decisions, then floods of requests on a manual clock."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from remora_agent.bank.policy import BankLimits, Fits, NoRoom, Place, Size
from remora_agent.bank.turns import Demand, Turns, newcomer_room, plan_turns
from tests.agent.bank.crowd import Crowd

TURN_S = 2.0


def place(digest, since, leases=1, pinned=False, rank=4):
    return Place(digest, Size(rank), leases, pinned, False, 0, since)


def plan(places, *overdue, rank=8, now=10.0, asked="", giving_way=""):
    demand = Demand(
        tuple({d: Size(r) for d, r in mix.items()} for mix in overdue),
        frozenset(asked),
        frozenset(giving_way),
    )
    return plan_turns(places, demand, BankLimits(rank), now, TURN_S)


def test_an_overdue_request_makes_the_longest_resident_give_way():
    turns = plan([place("a", 1.0), place("b", 0.0)], {"x": 4})
    assert turns.giving_way == {"b"}
    assert not turns.rooms  # b still has leases


def test_it_gets_in_once_the_last_lease_has_ended():
    turns = plan([place("a", 1.0), place("b", 0.0, leases=0)], {"x": 4}, asked="ab")
    assert turns.rooms == {frozenset("x"): Fits(("b",))}


def test_an_adapter_keeps_its_place_for_a_turn_and_the_room_is_kept_meanwhile():
    places = [place("a", 9.0), place("b", 8.5)]
    turns = plan(places, {"x": 4}, asked="ab")
    assert not turns.giving_way and turns.closed
    assert newcomer_room(places, {"y": Size(4)}, (), BankLimits(8), turns) == NoRoom()


def test_what_is_pinned_never_gives_way():
    assert plan([place("a", 0.0, pinned=True), place("b", 1.0)], {"x": 4}).giving_way == {"b"}


def test_who_gives_way_goes_on_doing_so():
    places = [place("a", 0.0), place("b", 1.0)]
    assert plan(places, {"x": 4}, giving_way="b").giving_way == {"b"}
    assert plan(places, giving_way="b") == Turns()


def test_two_overdue_requests_get_different_places():
    turns = plan([place("a", 0.0), place("b", 1.0)], {"x": 4}, {"y": 4})
    assert turns.giving_way == {"a", "b"}
    ended = [place("a", 0.0), place("b", 1.0, leases=0)]
    turns = plan(ended, {"x": 4}, {"y": 4}, asked="ab", giving_way="ab")
    assert turns.rooms == {frozenset("y"): Fits(("b",))}


def test_room_that_only_another_will_free_is_not_taken_before():
    """x (rank 2) makes a (rank 4) give way; what it leaves over is there when a has left."""
    turns = plan([place("a", 0.0), place("p", 0.0, pinned=True)], {"x": 2}, {"y": 2})
    assert turns.giving_way == {"a"} and not turns.rooms
    room = newcomer_room(
        [place("a", 0.0), place("p", 0.0, pinned=True)],
        {"n": Size(1)},
        (),
        BankLimits(8),
        plan([place("a", 0.0), place("p", 0.0, pinned=True)], {"x": 2}),
    )
    assert room == NoRoom()


def test_a_newcomer_takes_what_is_idle_and_not_asked_for():
    places = [place("a", 0.0, leases=0), place("b", 0.0, leases=0)]
    assert newcomer_room(places, {"x": Size(4)}, "a", BankLimits(8), Turns()) == Fits(("b",))
    assert newcomer_room(places, {"x": Size(4)}, "ab", BankLimits(8), Turns()) == NoRoom()


def test_an_overdue_mix_keeps_those_of_its_adapters_that_are_resident():
    turns = plan([place("a", 0.0, leases=0), place("b", 1.0, leases=0)], {"a": 4, "x": 4})
    assert turns.rooms == {frozenset("ax"): Fits(("b",))}
    assert "a" in turns.promised and "a" not in turns.giving_way


@settings(max_examples=60, deadline=None)
@given(
    adapters=st.integers(2, 9),
    places=st.integers(1, 4),
    rows=st.integers(1, 5),
    service=st.integers(1, 6),
    turn=st.integers(1, 8),
)
def test_under_a_flood_for_all_others_a_request_is_served_after_their_turns(
    adapters, places, rows, service, turn
):
    crowd = Crowd(adapters, places, rows, service, turn)
    flood = [f"{i}" for i in range(1, adapters)]

    def keep_flooding():
        waiting = [name for name, *_ in crowd.waiting]
        for name in flood:
            for _ in range(rows - waiting.count(name)):
                crowd.submit(name)

    for _ in range(3 * (turn + service)):
        keep_flooding()
        crowd.tick()
    asked_at = crowd.now
    crowd.submit("0")
    while not crowd.served.get("0"):
        keep_flooding()
        crowd.tick()
        assert crowd.now - asked_at <= (adapters + 1) * (turn + service + 3), "starved"
    crowd.drain()


@settings(max_examples=60, deadline=None)
@given(
    adapters=st.integers(2, 12),
    places=st.integers(1, 4),
    rows=st.integers(1, 5),
    service=st.integers(1, 6),
    turn=st.integers(1, 12),
    each=st.integers(1, 12),
)
def test_requests_that_alternate_over_more_adapters_than_fit_load_each_about_once_a_turn(
    adapters, places, rows, service, turn, each
):
    crowd = Crowd(adapters, places, rows, service, turn)
    for _ in range(each):
        for i in range(adapters):
            crowd.submit(f"{i}")
    crowd.drain()
    turns = crowd.now / turn
    assert crowd.loads <= min(adapters * each, adapters + places * (turns + 1))


def test_without_time_pressure_each_adapter_is_loaded_exactly_once():
    crowd = Crowd(adapters=9, places=3, rows=4, service=2, turn=10_000)
    for _ in range(10):
        for i in range(9):
            crowd.submit(f"{i}")
    crowd.drain()
    assert crowd.loads == 9


@pytest.mark.parametrize("large_first", [True, False])
def test_a_mix_that_needs_the_whole_bank_is_not_starved_by_single_adapters(large_first):
    crowd = Crowd(adapters=6, places=4, rows=4, service=3, turn=5)
    singles = deque(f"{i}" for i in range(6))
    if large_first:
        crowd.submit("0", "1", "2", "3")
    for tick in range(120):
        crowd.submit(singles[0])
        singles.rotate(-1)
        if tick == 20 and not large_first:
            crowd.submit("0", "1", "2", "3")
        crowd.tick()
    assert crowd.served["0+1+2+3"][0] <= 20 + 5 + 3 + 6
    crowd.drain()
