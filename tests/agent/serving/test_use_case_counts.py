"""Counting by names that callers choose: exact, and bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from remora_agent.runtime.api import (
    Delta,
    Failed,
    Finished,
    FinishReason,
    Provenance,
    Timings,
    Usage,
)
from remora_agent.serving.use_case_counts import MAX_LABELS, OTHER, UseCaseCount, UseCaseCounts
from remora_agent.telemetry.serving import serving_readings
from remora_contract.errors import EngineFault

# What a controller takes of a name, and of one device.
MAX_WIRE_NAME = 160
MAX_SERIES = 256


def finished(tokens: int = 3) -> Finished:
    usage, timings = Usage(7, 0, tokens), Timings(0, 0, 0, 0)
    return Finished(FinishReason.STOP, usage, timings, Provenance("b", "e"))


def ask(counts: UseCaseCounts, name: str, *events: object) -> list[object]:
    heard: list[object] = []
    listener = counts.listening(name, 7, heard.append)
    for event in events:
        listener(event)
    return heard


def test_every_event_is_passed_on_and_the_last_is_counted():
    counts = UseCaseCounts()
    events = [Delta("x", (1, 2)), Delta("", (3,)), finished()]
    assert ask(counts, "u", *events) == events
    assert counts.all() == (("u", UseCaseCount(1, 0, 7, 3)),)


def test_a_failed_request_counts_the_tokens_that_were_heard():
    counts = UseCaseCounts()
    ask(counts, "u", Delta("x", (1, 2)), Failed(EngineFault("no")))
    assert counts.all() == (("u", UseCaseCount(1, 1, 7, 2)),)


def test_it_is_counted_before_anybody_hears_of_the_end():
    counts = UseCaseCounts()
    seen = []
    listener = counts.listening("u", 1, lambda e: seen.append(counts.all()))
    listener(finished())
    assert seen == [(("u", UseCaseCount(1, 0, 7, 3)),)]


@given(st.lists(st.sampled_from([f"u{i}" for i in range(12)])))
def test_names_without_end_are_one_entry_and_nothing_is_lost(names):
    counts = UseCaseCounts(max_counted=4, max_labels=2)
    last: dict[str, float] = {}
    for name in names:
        ask(counts, name, finished())
        told = counts.metrics()
        # A counter only ever grows, and none disappears.
        assert all(told[key] >= value for key, value in last.items())
        last = told
    found = dict(counts.all())
    assert len(found) <= 5
    assert sum(c.requests for c in found.values()) == len(names)
    requests = {n: v for n, v in last.items() if n.startswith("use_case_requests.")}
    assert len(requests) <= 3
    assert sum(requests.values()) == len(names)
    first = list(dict.fromkeys(names))[:4]
    assert [n for n, _ in counts.all() if n != OTHER] == first


def test_the_longest_names_reach_the_controller_and_leave_room_for_others():
    counts = UseCaseCounts()
    for i in range(MAX_LABELS + 5):
        ask(counts, f"{i:03}".ljust(128, "x"), finished())
    readings = serving_readings(counts.metrics())
    assert len(readings) == 3 * (MAX_LABELS + 1) < MAX_SERIES / 2
    assert max(len(r.wire_name) for r in readings) <= MAX_WIRE_NAME
    assert all(r.is_counter for r in readings)


def test_a_name_with_dots_is_one_label():
    counts = UseCaseCounts()
    ask(counts, "a.b+c", finished())
    labels = {(r.name, r.label) for r in serving_readings(counts.metrics())}
    assert ("use_case_tokens_total", "a.b+c") in labels
