"""Samples as the wire brings them: told twice, with jitter, live or from history."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from remora_controller.domain import MetricPoint
from remora_controller.gates.samples import TOKENS, SampleKeeper
from remora_controller.presence import Presence
from remora_controller.services.wire import clock_ahead_s, metrics_of
from remora_protos.control.v1 import control_pb2 as pb

SPEED = "tokens_per_s"
WANTED = frozenset({SPEED, TOKENS})


def syncs(delays_s, ahead_s=0.0):
    """One busy device: each Sync tells the new total and speed, and the last Sync's once more."""
    presence, sent = Presence(0.0, 30.0), []
    for n, delay_s in enumerate(delays_s):
        at = 1e5 + 10.0 * n
        measured = [(at - 10.0, n - 1), (at, n)] if n else [(at, n)]
        request = pb.SyncRequest(sent_at_unix_s=at + ahead_s)
        for when, total in measured:
            for name, value in ((TOKENS, 100.0 * total), (SPEED, 20.0 + total)):
                request.metrics.add(name=name, value=value, at_unix_s=when + ahead_s)
        now = at + delay_s
        ahead = presence.ahead_s("d", clock_ahead_s(request, now))
        sent.append((now, metrics_of(request.metrics, "d", now, ahead)))
    return sent


def speeds(keeper):
    found = keeper.samples("d", SPEED, 0.0, 1e9)
    return found[0].values if found else ()


@given(
    st.lists(st.floats(0.0, 3.0), min_size=2, max_size=30),
    st.sampled_from([0.0, -3600.0, 500.0]),
)
def test_what_is_told_twice_is_one_sample_however_late_each_call_is(delays, ahead_s):
    # The first call is the fastest: what later ones add is delay, which is no news of the clock.
    live, filled, stored = SampleKeeper(), SampleKeeper(), []
    live.want(WANTED)
    for _, points in syncs([0.0, *delays], ahead_s):
        live.add(points)
        stored += points
    filled.want(WANTED)
    filled.fill(stored)
    expected = tuple(20.0 + n for n in range(len(delays) + 1))
    assert speeds(live) == speeds(filled) == expected
    (totals,) = live.samples("d", TOKENS, 0.0, 1e9)
    assert totals.values == tuple(100.0 * n for n in range(len(delays) + 1))


def test_a_clock_that_is_set_is_followed():
    presence = Presence(0.0, 30.0)
    assert presence.ahead_s("d", -0.4) == -0.4
    assert presence.ahead_s("d", -1.9) == -0.4, "a slow call"
    assert presence.ahead_s("d", -0.1) == -0.1, "a faster one measures better"
    assert presence.ahead_s("d", 3600.0) == 3600.0
    assert presence.ahead_s("d", -0.3) == -0.3, "it was set back"
    assert presence.ahead_s("other", -2.0) == -2.0


@pytest.mark.parametrize("sent_at", [0.0, float("nan"), float("inf"), -5.0])
def test_a_device_that_does_not_tell_its_clock_is_believed(sent_at):
    assert clock_ahead_s(pb.SyncRequest(sent_at_unix_s=sent_at), 1000.0) == 0.0


def test_what_came_while_history_was_read_is_not_counted_twice():
    point = MetricPoint("d", TOKENS, 5.0, 10.0)
    keeper = SampleKeeper()
    keeper.want(WANTED)
    keeper.add([point, MetricPoint("d", SPEED, 20.0, 10.0)])
    keeper.fill([MetricPoint("d", TOKENS, 4.0, 5.0), point, MetricPoint("d", SPEED, 20.0, 10.0)])
    assert speeds(keeper) == (20.0,)
    (totals,) = keeper.samples("d", TOKENS, 0.0, 1e9)
    assert totals.values == (4.0, 5.0)


def test_of_a_device_that_is_judged_alone_more_is_kept_than_of_the_others():
    keeper = SampleKeeper()
    assert keeper.want_of({"late": frozenset({SPEED})}) == {"late"}
    assert keeper.want_of({"late": frozenset({SPEED})}) == set()
    points = [MetricPoint(d, n, 7.0, 10.0) for d in ("late", "other") for n in (TOKENS, SPEED)]
    keeper.add(points)
    assert [len(keeper.samples(d, SPEED, 0.0, 1e9)) for d in ("late", "other")] == [1, 0]
    assert (keeper.newest_at("late", [SPEED], 11.0), keeper.newest_at("late", [SPEED], 10.0)) == (
        10.0,
        None,
    )
    keeper.want(WANTED)
    keeper.want(frozenset())
    assert keeper.samples("late", SPEED, 0.0, 1e9), "what the fleet no longer needs it does"
    keeper.want_of({})
    assert keeper.samples("late", SPEED, 0.0, 1e9) == ()
