"""The device's side of a rollout's total: nothing before the first answer or after the last."""

from __future__ import annotations

import pytest

from remora_agent.control.download_share import DownloadShare
from remora_agent.control.pacing import RateLimit
from remora_protos.control.v1 import control_pb2 as pb


def exchange(share: DownloadShare, granted: int | None) -> pb.SyncRequest:
    """A Sync without a network."""
    request, answer = pb.SyncRequest(), pb.SyncResponse()
    asked_s = share.put_into(request)
    if granted is not None:
        answer.download_share.bytes_per_s, answer.download_share.for_s = granted, 30.0
    share.answered(request, answer, asked_s)
    return request


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def share(clock):
    made = DownloadShare(5000, lambda: clock[0])
    made.assigned(True, 3000)
    return made


def test_nothing_is_fetched_before_an_answer_and_after_its_end(share, clock):
    with share.fetching():
        assert (share.rate(), share.wait_s() > 0) == (0, True)
        told = exchange(share, 800).fetching
        assert (told.limit_bytes_per_s, told.share_bytes_per_s) == (3000, 0)
        assert (share.rate(), share.wait_s()) == (800, 0.0)
        clock[0] += 29.9
        assert exchange(share, 0).fetching.share_bytes_per_s == 800
        assert share.wait_s() > 0
        exchange(share, 800)
        clock[0] += 30.0
        assert share.wait_s() > 0, "no answer for as long as the last one holds"
    assert share.rate() is None


def test_a_controller_that_tells_no_share_sets_no_limit(share):
    with share.fetching():
        exchange(share, None)
        assert (share.rate(), share.wait_s()) == (None, 0.0)


def test_what_was_asked_before_fetching_began_tells_nothing(share):
    request = pb.SyncRequest()
    asked_s = share.put_into(request)
    with share.fetching():
        share.answered(request, pb.SyncResponse(), asked_s)
        assert share.rate() == 0
        exchange(share, 700)
        assert share.rate() == 700
    with share.fetching():
        assert share.rate() == 0, "an earlier share is not this one's"


def test_the_sync_thread_hears_of_begin_and_end_but_not_of_what_is_not_shared(share):
    heard = []
    share.on_change = lambda: heard.append(1)
    with share.fetching():
        assert len(heard) == 1
    assert len(heard) == 2
    share.assigned(False, None)
    with share.fetching():
        assert (share.rate(), share.wait_s()) == (None, 0.0)
        assert not exchange(share, None).HasField("fetching")
    assert len(heard) == 2


@pytest.mark.parametrize(
    ("own", "assigned", "shared", "seconds"),
    [(1000, None, None, 1), (1000, None, 500, 2), (1000, 250, 500, 4), (None, None, 500, 2)],
)
def test_the_smallest_of_all_caps_holds(own, assigned, shared, seconds):
    rate = RateLimit(own, 0.0)
    rate.cap(assigned)
    rate.shared = lambda: shared
    assert rate.delay_s(1000, 0.0) == pytest.approx(seconds)
