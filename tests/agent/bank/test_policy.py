"""What may be resident: decided purely, checked for all small banks."""

from hypothesis import given
from hypothesis import strategies as st

from remora_agent.bank.policy import (
    BankLimits,
    Fits,
    NoRoom,
    Place,
    Size,
    least_recently_used,
    make_room,
    more_that_fit,
    never_fits,
    total,
)
from remora_agent.bank.reading import plan_reads

SIZES = st.builds(Size, st.integers(1, 8), st.integers(1, 20))
PLACES = st.lists(
    st.tuples(SIZES, st.integers(0, 2), st.booleans(), st.integers(0, 50)), max_size=6
).map(
    lambda rows: [
        Place(f"r{i}", size, leases, pinned, False, used, 0.0)
        for i, (size, leases, pinned, used) in enumerate(rows)
    ]
)
WANTED = st.dictionaries(st.sampled_from(["r0", "r1", "r2", "n0", "n1"]), SIZES)


def place(digest, rank=4, leases=0, pinned=False, used=0, size_bytes=1):
    return Place(digest, Size(rank, size_bytes), leases, pinned, False, used, 0.0)


def room_for(places, wanted, limits):
    return make_room(places, wanted, limits, least_recently_used(places))


@given(PLACES, WANTED, st.integers(0, 12), st.none() | st.integers(0, 30))
def test_room_is_made_within_both_limits_and_only_at_the_cost_of_what_nobody_holds(
    places, wanted, spare, spare_bytes
):
    sizes = {p.digest: p.size for p in places}
    wanted = {d: sizes.get(d, s) for d, s in wanted.items()}
    held = total(sizes.values())
    limits = BankLimits(
        held.rank + spare, None if spare_bytes is None else held.bytes + spare_bytes
    )
    room = room_for(places, wanted, limits)
    leaving = {p.digest for p in places if p.idle} - wanted.keys()

    def after(evicted):
        return total(size for d, size in {**sizes, **wanted}.items() if d not in evicted)

    if isinstance(room, NoRoom):
        assert not limits.hold(after(leaving))
        return
    assert set(room.evict) <= leaving
    assert limits.hold(after(room.evict))
    # None of them leaves in vain.
    assert not any(limits.hold(after(set(room.evict) - {d})) for d in room.evict)


def test_the_least_recently_used_leaves_first():
    places = [place("a", used=3), place("b", used=1), place("c", used=2)]

    def room(**wanted):
        return room_for(places, {d: Size(r) for d, r in wanted.items()}, BankLimits(12))

    assert room(n=4) == Fits(("b",))
    assert room(n=8) == Fits(("b", "c"))
    assert room(n=12) == Fits(("b", "c", "a"))
    assert room(n=13) == NoRoom()
    assert room(n=4, b=4) == Fits(("c",))


def test_what_needs_many_bytes_pushes_out_more_than_its_rank_does():
    places = [place("a", used=1, size_bytes=50), place("b", used=2, size_bytes=50)]
    wanted = {"n": Size(4, 100)}
    assert room_for(places, wanted, BankLimits(12)) == Fits()
    assert room_for(places, wanted, BankLimits(12, 150)) == Fits(("a",))
    assert room_for(places, wanted, BankLimits(12, 149)) == Fits(("a", "b"))
    assert room_for(places, wanted, BankLimits(12, 99)) == NoRoom()


def test_what_can_never_fit_beside_the_pinned_is_told_apart():
    pinned, limits = {"p": Size(8, 10)}, BankLimits(16, 30)
    assert never_fits(pinned, {"a": Size(8, 20)}, limits) is None
    assert never_fits(pinned, {"a": Size(9, 20)}, limits) == Size(17, 30)
    assert never_fits(pinned, {"a": Size(8, 21)}, limits) == Size(16, 31)
    assert never_fits(pinned, {"p": Size(8, 10), "a": Size(8, 20)}, limits) is None


def test_capacity_counts_what_could_leave_by_rank_and_by_bytes():
    places = [place("leased", leases=1), place("idle"), place("pinned", pinned=True)]
    assert more_that_fit(places, BankLimits(16), Size(4, 1)) == 2
    assert more_that_fit(places, BankLimits(16), Size(3, 1)) == 2
    assert more_that_fit(places, BankLimits(16), Size(9, 1)) == 0
    assert more_that_fit(places, BankLimits(16, 7), Size(4, 4)) == 1
    assert more_that_fit(places, BankLimits(16, 5), Size(4, 4)) == 0
    assert more_that_fit(places, BankLimits(4), Size(1, 1)) == 0


@given(PLACES, SIZES, st.integers(0, 40), st.none() | st.integers(0, 80))
def test_as_many_as_capacity_promises_really_fit_and_no_more(places, one, rank, max_bytes):
    limits = BankLimits(rank, max_bytes)
    if not limits.hold(total(p.size for p in places)):
        return
    count = more_that_fit(places, limits, one)
    for more, fits in ((count, True), (count + 1, False)):
        wanted = {f"new{i}": one for i in range(more)}
        assert isinstance(room_for(places, wanted, limits), Fits) is fits


def test_reads_are_planned_for_the_first_requests_that_fit_host_memory_together():
    mixes = [{"a": 4, "b": 4}, {"c": 4}, {"d": 1}]
    assert plan_reads(mixes, {}, {"b"}, 9) == (("a",), frozenset({"a", "b"}))
    assert plan_reads(mixes, {"a"}, set(), 9) == (("b", "c", "d"), frozenset({"b", "c", "d"}))
    assert plan_reads(mixes, {}, set(), 7) == ((), frozenset())
