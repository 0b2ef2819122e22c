"""A release with another bundle: the old one serves until the new one stands, no request fails."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from remora_contract.errors import EngineFault, Refused, Unavailable
from remora_contract.gates import GoldenQuestion
from tests.agent.host.load import OPTIONS
from tests.support.serving import ReferenceEngines, World, running_stack


def wait_closed(engines, count: int) -> None:
    """Until all but `count` of the opened engines are closed."""
    pause = threading.Event()
    for _ in range(1000):
        if sum(not e.closed for e in engines.opened) <= count:
            return
        pause.wait(0.01)
    raise AssertionError("an old engine was never closed")


def wait_counted(host, wanted: dict[str, float]) -> None:
    """A step counts itself after its requests have heard of their end."""
    pause = threading.Event()
    for _ in range(1000):
        if wanted.items() <= dict(host.metrics()).items():
            return
        pause.wait(0.01)
    raise AssertionError(host.metrics())


class Watch(threading.Thread):
    """Reads the counters all the time; they may only grow."""

    def __init__(self, host) -> None:
        super().__init__()
        self._host, self._over, self.went_back = host, threading.Event(), []

    def run(self) -> None:
        before = 0.0
        while not self._over.wait(0.001):
            now = self._host.metrics().get("requests", 0.0)
            if now < before:
                self.went_back.append((before, now))
            before = now

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self.join()


@pytest.mark.parametrize("fits", [True, False])
def test_under_load_every_request_is_answered_by_exactly_one_bundle(hosted, fits):
    world, bundles = hosted.world, ["base", "second", "third", "base"]
    hosted.engines.fits = fits
    hosted.host.switch(world.assignment("0", bundles[0], [("a", "r1")]))
    with (
        Watch(hosted.host) as watch,
        hosted.load({"adapter": "a"}, {"adapter": None}) as load,
    ):
        for i, bundle in enumerate(bundles[1:], 1):
            hosted.host.switch(world.assignment(str(i), bundle, [("a", f"r{i}")]))
            load.wait_answers(6)
    load.check(hosted.solo)
    assert watch.went_back == []
    pairs = {
        (world.bundle(b).digest, world.adapter("a", "r1" if i == 0 else f"r{i}").digest)
        for i, b in enumerate(bundles)
    }
    for _, _, result in load.answers:
        bundle = result.provenance.bundle_digest
        assert bundle in {world.bundle(b).digest for b in bundles}
        for adapter in result.provenance.adapters:
            assert (bundle, adapter.digest) in pairs
    assert len(hosted.engines.opened) == 4
    wait_closed(hosted.engines, 1)


def test_a_stream_outlives_the_switch_beside_it(hosted):
    world = hosted.world
    hosted.host.switch(world.assignment("one"))
    hosted.engines.gate.clear()
    stream = hosted.client.stream("x", **OPTIONS)
    hosted.host.switch(world.assignment("two", "second"))
    hosted.engines.gate.set()
    assert hosted.client.cancel("nobody") is False
    list(stream)
    assert stream.result.provenance.bundle_digest == world.bundle("base").digest
    result = hosted.client.generate("x", **OPTIONS)
    assert result.provenance.bundle_digest == world.bundle("second").digest
    wait_closed(hosted.engines, 1)


def test_where_two_do_not_fit_the_old_is_closed_first_and_calls_wait(hosted):
    world, engines = hosted.world, hosted.engines
    hosted.host.switch(world.assignment("one"))
    engines.fits = False
    engines.gate.clear()
    stream = hosted.client.stream("x", **OPTIONS)
    switch = threading.Thread(target=hosted.host.switch, args=(world.assignment("2", "second"),))
    switch.start()
    pause = threading.Event()
    while hosted.client.status().state != "loading":
        pause.wait(0.005)
    late: list[str] = []
    caller = threading.Thread(
        target=lambda: late.append(hosted.client.generate("y", **OPTIONS).provenance.bundle_digest)
    )
    caller.start()
    while hosted.client.status().queued < 1:
        pause.wait(0.005)
    assert len(engines.opened) == 1
    engines.gate.set()
    switch.join()
    caller.join()
    list(stream)
    assert stream.result.provenance.bundle_digest == world.bundle("base").digest
    assert late == [world.bundle("second").digest]
    assert [e.closed for e in engines.opened] == [True, False]


@pytest.mark.parametrize("fits", [True, False])
def test_a_bundle_that_does_not_open_leaves_the_old_one_serving(hosted, fits):
    world = hosted.world
    hosted.host.switch(world.assignment("one", adapters=[("a", "r1")]))
    hosted.engines.fits = fits
    hosted.engines.refuse["second"] = EngineFault("it will not load")
    with hosted.load({"adapter": "a"}) as load:
        with pytest.raises(EngineFault, match="will not load"):
            hosted.host.switch(world.assignment("two", "second", [("a", "r2")]))
        load.wait_answers(4)
    load.check(hosted.solo)
    expected = (world.bundle("base").digest, world.adapter("a", "r1").digest)
    for _, _, result in load.answers:
        adapter = result.provenance.adapters[0]
        assert (result.provenance.bundle_digest, adapter.digest) == expected
    assert hosted.host.serving().release_id == "one"
    wait_closed(hosted.engines, 1)


def test_when_neither_opens_calls_are_told_and_a_later_switch_recovers(hosted):
    world, engines = hosted.world, hosted.engines
    hosted.host.switch(world.assignment("one"))
    engines.fits = False
    engines.refuse = {n: EngineFault("no engine today") for n in ("base", "second")}
    with pytest.raises(EngineFault):
        hosted.host.switch(world.assignment("two", "second"))
    assert hosted.host.serving() is None
    with pytest.raises(Unavailable, match="no model"):
        hosted.client.generate("x")
    engines.refuse = {}
    hosted.host.switch(world.assignment("two", "second"))
    assert hosted.client.generate("x", **OPTIONS).text is not None


def test_requests_that_do_not_end_in_time_keep_their_model(tmp_path):
    from remora_agent.client import Client
    from remora_agent.local_host import HostSettings

    world, engines = World(tmp_path), ReferenceEngines()
    with (
        running_stack(tmp_path, engines, host=HostSettings(idle_s=0.1)) as (stack, address),
        Client(address, timeout_s=30) as client,
    ):
        stack.host.switch(world.assignment("one"))
        engines.fits = False
        engines.gate.clear()
        stream = client.stream("x", **OPTIONS)
        with pytest.raises(Refused, match="does not fit in memory"):
            stack.host.switch(world.assignment("two", "second"))
        engines.gate.set()
        assert "".join(d.text for d in stream) == stream.result.text
        assert stack.host.serving().release_id == "one"
        assert client.generate("x", **OPTIONS).text is not None


def test_counters_never_go_back_over_a_switch(hosted):
    world = hosted.world
    for i, bundle in enumerate(["base", "second", "third"], 1):
        hosted.host.switch(world.assignment(str(i), bundle))
        hosted.client.generate("x", **OPTIONS)
        wait_counted(hosted.host, {"requests": i, "tokens": 6 * i, "failures": 0})
    hosted.engines.fits = False
    hosted.host.switch(world.assignment("4", "base"))
    wait_closed(hosted.engines, 1)
    wait_counted(hosted.host, {"requests": 3, "tokens": 18, "failures": 0})


def test_an_engine_fault_is_counted_once_and_survives_a_switch(hosted):
    hosted.host.switch(hosted.world.assignment("one"))
    assert hosted.host.metrics()["engine_faults"] == 0
    hosted.engines.opened[0].faults.append(EngineFault("the backend failed"))
    with pytest.raises(EngineFault):
        hosted.client.generate("x", **OPTIONS)
    hosted.host.switch(hosted.world.assignment("two", "second"))
    assert hosted.host.metrics()["engine_faults"] == 1


def test_proving_hands_bundle_and_adapters_to_the_probe(hosted):
    world = hosted.world
    hosted.host.prove(world.assignment(adapters=[("a", "r1")]), lambda phase, done: None)
    assert hosted.engines.probed == [world.root / "b" / "base"]


def test_golden_questions_are_asked_beside_the_incumbent(hosted):
    world, question = hosted.world, GoldenQuestion("q", "exact", text="a", expected_text="b")
    assignment = replace(world.assignment("one"), golden=(question,))
    hosted.host.prove(assignment, lambda phase, done: None)
    hosted.host.switch(world.assignment("two"))
    hosted.host.prove(assignment, lambda phase, done: None)
    other = world.assignment("two").release_id
    assert hosted.engines.asked == [
        (assignment.release_id, None),
        (assignment.release_id, other),
    ]


def test_a_dead_step_thread_is_unhealthy_and_a_switch_replaces_it(hosted):
    world = hosted.world
    hosted.host.switch(world.assignment("one"))
    assert hosted.host.healthy()
    engine = hosted.engines.opened[0]
    died = threading.Event()
    previous, threading.excepthook = threading.excepthook, lambda args: died.set()
    try:
        engine.faults.append(ZeroDivisionError("a bug"))
        with pytest.raises(EngineFault):
            hosted.client.generate("x", **OPTIONS)
        assert died.wait(10)
    finally:
        threading.excepthook = previous
    assert not hosted.host.healthy()
    assert hosted.host.serving() is None
    hosted.host.switch(world.assignment("one"))
    assert hosted.host.healthy()
    assert hosted.client.generate("x", **OPTIONS).text is not None


releases = st.tuples(
    st.sampled_from(["base", "second"]),
    st.dictionaries(st.sampled_from("ab"), st.sampled_from(["r1", "r2"])),
    st.booleans(),  # whether two engines fit
)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(releases, min_size=1, max_size=6))
def test_whatever_the_order_of_releases_the_last_one_answers(hosted, order):
    world = hosted.world
    for i, (bundle, adapters, fits) in enumerate(order):
        hosted.engines.fits = fits
        hosted.host.switch(world.assignment(str(i), bundle, list(adapters.items())))
        base = hosted.client.generate("x", **OPTIONS)
        assert base.provenance.bundle_digest == world.bundle(bundle).digest
        for name, revision in adapters.items():
            result = hosted.client.generate("x", adapter=name, **OPTIONS)
            assert result.provenance.adapters[0].digest == world.adapter(name, revision).digest
            assert result.token_ids == hosted.solo("x", result)
        state = hosted.host.serving()
        assert {(a.name, a.revision) for a in state.adapters} == set(adapters.items())
