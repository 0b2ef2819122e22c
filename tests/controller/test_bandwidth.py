"""A rollout's total among those that fetch: never exceeded, and fair once all have heard."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remora_controller.bandwidth import SHARE_FOR_S, BandwidthBook, max_min_shares, share_for_s
from remora_controller.services.fleet import SYNCS_PER_S

LIMITS = st.dictionaries(
    st.sampled_from("abcdef"), st.none() | st.integers(1, 2000), min_size=1, max_size=6
)


@given(st.integers(1, 10_000), LIMITS)
def test_shares_are_equal_but_for_those_whose_own_limit_is_lower(total, limits):
    shares = max_min_shares(total, limits)
    assert sum(shares.values()) <= total
    most = max(shares.values())
    for device, share in shares.items():
        limit = limits[device]
        assert limit is None or share <= limit
        assert share == limit or share >= most - len(limits), "nobody has more than a held-back one"
    if all(limit is None for limit in limits.values()):
        assert sum(shares.values()) == total


class Devices:
    """What devices hold, as agents do: until told otherwise, and at most SHARE_FOR_S."""

    def __init__(self, total: int) -> None:
        self.total, self.now = total, 1000.0
        self.book = BandwidthBook(self.now)
        self.held: dict[str, tuple[int, float]] = {}

    def sync(self, device: str, limit: int | None = None) -> int:
        share = self.book.share("r", self.total, device, limit, self.holds(device), self.now)
        self.held[device] = (share, self.now + SHARE_FOR_S)
        return share

    def holds(self, device: str) -> int:
        share, until = self.held.get(device, (0, 0.0))
        return share if self.now < until else 0

    def stop(self, device: str) -> None:
        self.held.pop(device, None)
        self.book.end("r", device)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["sync", "sync", "sync", "stop", "restart", "time"]),
        st.sampled_from("abcde"),
        st.none() | st.integers(1, 400),
        st.floats(0, 40),
    ),
    max_size=60,
)


@given(STEPS)
def test_what_devices_hold_together_never_exceeds_the_total(steps):
    """Also over restarts of the controller, and where devices fall silent."""
    world = Devices(1000)
    world.now += 100
    for what, device, limit, passes_s in steps:
        if what == "sync":
            world.sync(device, limit)
        elif what == "stop":
            world.stop(device)
        elif what == "restart":
            world.book = BandwidthBook(world.now)
        else:
            world.now += passes_s
        assert sum(world.holds(d) for d in "abcde") <= 1000


def test_a_newcomer_gets_its_part_as_soon_as_the_others_have_heard():
    world = Devices(1000)
    world.now += 100
    assert world.sync("a") == 1000
    assert world.sync("b") == 0
    assert world.sync("a") == 500
    assert world.sync("b") == 500
    world.stop("a")
    assert world.sync("b") == 1000


def test_the_part_of_one_that_fell_silent_is_given_on():
    world = Devices(1000)
    world.now += 100
    world.sync("a")
    world.now += 2 * SHARE_FOR_S
    assert world.sync("b") == 1000


def test_a_controller_that_has_just_started_confirms_what_devices_hold_and_grants_no_more():
    world = Devices(1000)
    world.now += 100
    for device in "aba":
        world.sync(device)
    world.book = BandwidthBook(world.now)
    assert world.sync("c") == 0
    assert world.sync("a") <= 500
    world.now += 2 * SHARE_FOR_S
    assert world.sync("c") == 1000


def test_a_share_outlasts_the_syncs_of_a_large_fleet():
    """At 50,000 devices the next Sync is minutes away: what fetches must not stop in between."""
    interval_s = 50_000 / SYNCS_PER_S
    for_s = share_for_s(interval_s)
    assert for_s > interval_s + 30
    book = BandwidthBook(0.0)
    assert book.share("r", 1000, "a", None, 400, 100.0, for_s) == 400, "others may hold the rest"
    assert book.share("r", 1000, "a", None, 400, 400.0, for_s) == 1000
    assert book.share("r", 1000, "b", None, 0, 400.0 + interval_s, for_s) == 0, "a has it still"
    assert book.share("r", 1000, "b", None, 0, 420.0 + for_s, for_s) == 1000, "a fell silent"
    assert share_for_s(2.0) == SHARE_FOR_S
