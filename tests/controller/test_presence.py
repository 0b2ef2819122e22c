"""Who is there."""

import threading

from hypothesis import given
from hypothesis import strategies as st

from remora_controller import presence as presences
from remora_controller.domain import BootTrail, Device, MetricPoint, Sighting
from remora_controller.presence import Presence

TRAIL = BootTrail("b", 1)


def test_a_device_is_online_for_a_while_after_it_spoke():
    presence = Presence(0.0, 30.0)
    presence.seen("d", TRAIL, 10.0, is_stored=False)
    assert presence.is_online("d", 39.0)
    assert not presence.is_online("d", 40.0)
    assert presence.online(20.0) == {"d"}


def test_nobody_is_surely_gone_before_the_controller_has_listened_long_enough():
    presence = Presence(100.0, 30.0)
    presence.load([Device("d", 0.0, "k", last_seen=10.0)], {})
    assert not presence.is_online("d", 110.0)
    assert not presence.is_gone("d", 110.0)
    assert presence.is_gone("d", 130.0)


def test_a_device_asked_to_stay_away_longer_is_missed_later():
    presence = Presence(0.0, 45.0)
    presence.seen("d", TRAIL, 10.0, is_stored=False)
    presence.awaits("d", 10.0, 60.0)
    assert presence.is_online("d", 92.0)
    assert not presence.is_online("d", 92.5)
    assert presence.online(92.0) == {"d"}
    assert not presence.is_gone("d", 92.0)


def test_a_device_whose_stream_ended_is_missed_as_if_it_had_spoken_then():
    presence = Presence(0.0, 45.0)
    presence.seen("d", TRAIL, 10.0, is_stored=False)
    presence.awaits("d", 10.0, 60.0)
    presence.left("d", 20.0)
    assert presence.is_online("d", 64.0)
    assert not presence.is_online("d", 65.0)


def test_a_device_that_never_spoke_is_not_online_because_a_stream_ended():
    presence = Presence(0.0, 45.0)
    presence.awaits("d", 10.0, 60.0)
    presence.left("d", 11.0)
    assert not presence.is_online("d", 12.0)


def test_what_the_store_has_not_heard_comes_in_one_order():
    presence, names = Presence(0.0, 30.0), [f"d{i:02d}" for i in range(20)]
    for name in reversed(names):
        presence.seen(name, TRAIL, 10.0, is_stored=False)
    sightings, _ = presence.take_unsaved()
    assert [s.device_id for s in sightings] == names


@given(
    st.lists(
        st.tuples(st.sampled_from(("sync", "stream", "left")), st.floats(0, 100), st.floats(0, 600))
    )
)
def test_whoever_comes_when_it_was_asked_to_is_never_missed(story):
    """Every contact comes within the time the one before it asked for; a stream that ends only
    shortens that."""
    presence, now, limit = Presence(0.0, 45.0), 0.0, 44.0
    presence.seen("d", TRAIL, now, is_stored=False)
    presence.awaits("d", now, 0.0)
    for what, after_s, wait_s in story:
        now = min(now + after_s, limit)
        assert presence.is_online("d", now)
        if what == "left":
            presence.left("d", now)
            limit = min(limit, now + 44.0)
            continue
        if what == "sync":
            presence.seen("d", TRAIL, now, is_stored=False)
        presence.awaits("d", now, wait_s)
        limit = now + max(44.0, wait_s)


def test_after_a_start_nobody_is_missed_that_the_former_process_asked_to_stay_away():
    presence = Presence(100.0, 45.0)
    presence.load([Device("d", 0.0, "k", last_seen=45.0)], {}, longest_wait_s=60.0)
    assert presence.is_online("d", 120.0)
    assert not presence.is_online("d", 128.0)


def test_heartbeats_are_handed_over_once_and_not_when_stored_otherwise():
    presence = Presence(0.0, 30.0)
    presence.seen("quiet", TRAIL, 1.0, is_stored=False)
    presence.seen("quiet", TRAIL, 2.0, is_stored=False)
    presence.seen("news", TRAIL, 2.0, is_stored=True)
    assert presence.take_unsaved() == ([Sighting("quiet", TRAIL, 2.0)], [])
    assert presence.take_unsaved() == ([], [])


def test_decisions_may_read_while_syncs_write():
    """Two threads: the event loop hears devices while the store's thread asks who is there."""
    presence, done = Presence(0.0, 30.0), threading.Event()

    def hear() -> None:
        for i in range(30_000):
            presence.seen(f"d{i}", BootTrail(), 1.0, is_stored=False)
        done.set()

    writer = threading.Thread(target=hear)
    writer.start()
    while not done.is_set():
        presence.online(2.0)
        presence.take_unsaved()
    writer.join()
    assert len(presence.online(2.0)) == 30_000


def test_callers_that_were_turned_away_are_bounded(monkeypatch):
    monkeypatch.setattr("remora_controller.presence.MAX_TURNED_AWAY", 2)
    presence = Presence(0.0, 30.0)
    for at, device in enumerate(["a", "b", "a", "c"]):
        presence.turn_away(device, float(at))
    assert presence.turned_away(4.0) == {"a": 2.0, "c": 3.0}


def test_metrics_keep_the_newest_value_and_are_bounded(monkeypatch):
    monkeypatch.setattr(presences, "MAX_PENDING_POINTS", 5)
    monkeypatch.setattr(presences, "MAX_METRICS_PER_DEVICE", 2)
    presence = Presence(0.0, 30.0)
    presence.add_metrics("d", [MetricPoint("d", "a", 1, 5.0), MetricPoint("d", "a", 2, 4.0)])
    presence.add_metrics("d", [MetricPoint("d", n, 3, 6.0) for n in "bcdefgh"])
    assert {n: p.value for n, p in presence.metrics("d").items()} == {"a": 1, "b": 3}
    assert len(presence.take_unsaved()[1]) <= 5


def test_a_forgotten_device_leaves_nothing():
    presence = Presence(0.0, 30.0)
    presence.seen("d", TRAIL, 1.0, is_stored=False)
    presence.add_metrics("d", [MetricPoint("d", "a", 1, 5.0)])
    presence.forget("d")
    assert (presence.last_seen("d"), dict(presence.metrics("d")), presence.count()) == (None, {}, 0)
    assert presence.take_unsaved()[0] == []


def test_what_the_store_could_not_take_is_told_again_before_what_came_since():
    presence = Presence(0.0, 30.0)
    presence.seen("d", TRAIL, 1.0, is_stored=False)
    presence.add_metrics("d", [MetricPoint("d", "m", 1.0, 1.0)])
    sightings, points = presence.take_unsaved()
    presence.add_metrics("d", [MetricPoint("d", "m", 2.0, 2.0)])
    presence.put_back([*sightings, Sighting("removed", TRAIL, 1.0)], points)
    again, told = presence.take_unsaved()
    assert [p.value for p in told] == [1.0, 2.0]
    assert again == sightings, "and nobody who was removed meanwhile"


def test_what_is_put_back_is_bounded(monkeypatch):
    monkeypatch.setattr(presences, "MAX_PENDING_POINTS", 3)
    presence = Presence(0.0, 30.0)
    presence.add_metrics("d", [MetricPoint("d", "m", float(n), n) for n in (3, 4)])
    presence.put_back([], [MetricPoint("d", "m", float(n), n) for n in (0, 1, 2)])
    assert [p.value for p in presence.unsaved_points()] == [2.0, 3.0, 4.0], "the oldest go"
