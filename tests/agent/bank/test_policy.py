"""What may be resident: decided purely, checked for all small banks."""

from hypothesis import given
from hypothesis import strategies as st

from remora_agent.bank.policy import (
    Fits,
    NoRoom,
    Place,
    capacity,
    make_room,
    never_fits,
    plan_loads,
)

PLACES = st.lists(
    st.tuples(st.integers(1, 8), st.integers(0, 2), st.booleans(), st.integers(0, 50)), max_size=6
).map(
    lambda rows: [
        Place(f"r{i}", rank, 1, leases, pinned, False, used)
        for i, (rank, leases, pinned, used) in enumerate(rows)
    ]
)
WANTED = st.dictionaries(st.sampled_from(["r0", "r1", "r2", "n0", "n1"]), st.integers(1, 8))


@given(PLACES, WANTED, st.integers(0, 12))
def test_room_is_made_within_capacity_and_only_at_the_cost_of_what_nobody_holds(
    places, wanted, spare
):
    ranks = {p.digest: p.rank for p in places}
    wanted = {d: ranks.get(d, r) for d, r in wanted.items()}
    max_rank = sum(ranks.values()) + spare
    room = make_room(places, wanted, max_rank)
    evictable = [p for p in places if p.evictable and p.digest not in wanted]
    need = sum(r for d, r in wanted.items() if d not in ranks)
    if isinstance(room, NoRoom):
        assert need > spare + sum(p.rank for p in evictable)
        return
    assert set(room.evict) <= {p.digest for p in evictable}
    freed = sum(ranks[d] for d in room.evict)
    assert need <= spare + freed
    # None of them leaves in vain.
    assert all(need > spare + freed - ranks[d] for d in room.evict)


def test_the_least_recently_used_leaves_first():
    places = [Place(d, 4, 1, 0, False, False, used) for d, used in [("a", 3), ("b", 1), ("c", 2)]]
    assert make_room(places, {"n": 4}, 12) == Fits(("b",))
    assert make_room(places, {"n": 8}, 12) == Fits(("b", "c"))
    assert make_room(places, {"n": 12}, 12) == Fits(("b", "c", "a"))
    assert make_room(places, {"n": 13}, 12) == NoRoom(13, 12)
    assert make_room(places, {"n": 4, "b": 4}, 12) == Fits(("c",))


def test_what_can_never_fit_beside_the_pinned_is_told_apart():
    assert never_fits({"p": 8}, {"a": 8}, 16) is None
    assert never_fits({"p": 8}, {"a": 9}, 16) == 17
    assert never_fits({"p": 8}, {"p": 8, "a": 8}, 16) is None


def test_capacity_counts_what_could_leave():
    places = [
        Place("leased", 4, 1, 1, False, False, 0),
        Place("idle", 4, 1, 0, False, False, 0),
        Place("pinned", 4, 1, 0, True, False, 0),
    ]
    found = capacity(places, 16, 4)
    assert (found.used_rank, found.evictable_rank, found.more_adapters) == (12, 4, 2)
    assert capacity(places, 16, 3).more_adapters == 2
    assert capacity(places, 16, 9).more_adapters == 0


def test_loads_are_planned_for_the_oldest_requests_that_fit_host_memory_together():
    mixes = [{"a": 4, "b": 4}, {"c": 4}, {"d": 1}]
    assert plan_loads(mixes, {}, {"b"}, 9) == (("a",), frozenset({"a", "b"}))
    assert plan_loads(mixes, {"a"}, set(), 9) == (("b", "c", "d"), frozenset({"b", "c", "d"}))
    assert plan_loads(mixes, {}, set(), 7) == ((), frozenset())
