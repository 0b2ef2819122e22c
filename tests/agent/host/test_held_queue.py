"""What waits in the queue outlives a switch of engines: answered once, by the new one."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from remora_agent.client import Client
from remora_agent.local_host import HostSettings
from remora_agent.runtime.api import (
    Accepted,
    Failed,
    Finished,
    FinishReason,
    Provenance,
    Timings,
    Usage,
)
from remora_agent.runtime.options import RuntimeOptions
from remora_agent.serving.call import GenerateCall, TokenPrompt
from remora_agent.serving.held_calls import HeldCall, HeldCalls
from remora_agent.serving.served_model import ServedModel
from remora_agent.serving.waiting_calls import AcceptedOnce
from remora_agent.text.pipeline import Encoded
from remora_contract.errors import EngineFault, NotFound, Refused, RemoraError, Unavailable
from tests.agent.host.load import OPTIONS
from tests.agent.host.test_bundle_switch import wait_closed
from tests.support.serving import ReferenceEngines, World, running_stack


class Caller(threading.Thread):
    def __init__(self, client, prompt: str, **options) -> None:
        super().__init__(daemon=True)
        self._client, self._prompt, self._options = client, prompt, options
        self.result, self.error = None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._client.generate(self._prompt, **{**OPTIONS, **self._options})
        except RemoraError as e:
            self.error = e

    def ended(self):
        self.join(30)
        assert not self.is_alive()
        return self


def until(condition) -> None:
    pause, limit = threading.Event(), time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        pause.wait(0.005)


def crowded(hosted, waiting: int = 3, **options):
    """One row that stands still in the first engine, and callers behind it."""
    hosted.engines.rows = 1
    hosted.host.switch(hosted.world.assignment("one", adapters=[("a", "r1")]))
    hosted.engines.gate.clear()
    running = [Caller(hosted.client, "running")]
    until(lambda: hosted.client.status().rows_busy == 1)
    queue = [Caller(hosted.client, f"waiting {i}", **options) for i in range(waiting)]
    until(lambda: hosted.client.status().queued == waiting)
    return running, queue


def switching(hosted, assignment):
    thread = threading.Thread(target=hosted.host.switch, args=(assignment,))
    thread.start()
    return thread


def switching_in_vain(hosted, assignment) -> list[RemoraError]:
    """What the switch raises, once the old engine was let go on."""
    errors: list[RemoraError] = []

    def switch() -> None:
        try:
            hosted.host.switch(assignment)
        except RemoraError as e:
            errors.append(e)

    thread = threading.Thread(target=switch)
    thread.start()
    until(lambda: hosted.client.status().state == "loading")
    hosted.engines.gate.set()
    thread.join(30)
    return errors


@pytest.mark.parametrize("fits", [True, False])
def test_waiting_requests_are_answered_by_the_new_engine_and_running_ones_by_the_old(hosted, fits):
    world = hosted.world
    running, queue = crowded(hosted, adapter="a")
    hosted.engines.fits = fits
    thread = switching(hosted, world.assignment("two", "second", [("a", "r2")]))
    if fits:
        until(lambda: hosted.client.status().bundle_digest == world.bundle("second").digest)
    else:
        until(lambda: hosted.client.status().state == "loading")
        assert len(hosted.engines.opened) == 1
    hosted.engines.gate.set()
    thread.join(30)
    for caller in running:
        assert caller.ended().result.provenance.bundle_digest == world.bundle("base").digest
    for i, caller in enumerate(queue):
        result = caller.ended().result
        assert result.provenance.bundle_digest == world.bundle("second").digest
        assert result.provenance.adapters[0].digest == world.adapter("a", "r2").digest
        assert result.token_ids == hosted.solo(f"waiting {i}", result)
    wait_closed(hosted.engines, 1)


def test_what_waited_goes_into_the_new_queue_before_any_new_call(tmp_path, monkeypatch):
    world, engines = World(tmp_path), ReferenceEngines(rows=1)
    small = HostSettings(RuntimeOptions(max_waiting=4), idle_s=20.0)
    with (
        running_stack(tmp_path, engines, host=small) as (stack, address),
        Client(address, timeout_s=30) as client,
    ):
        hosted = SimpleNamespace(engines=engines, host=stack.host, world=world, client=client)
        _, queue = crowded(hosted)
        give_up, crowd = ServedModel.give_up_waiting, []

        def then_a_crowd_comes(model, *args):
            held = give_up(model, *args)
            crowd.extend(Caller(client, f"late {i}") for i in range(4))
            until(lambda: client.status().queued >= 3)
            return held

        monkeypatch.setattr(ServedModel, "give_up_waiting", then_a_crowd_comes)
        stack.host.switch(world.assignment("two", "second"))
        engines.gate.set()
        for caller in queue:
            assert caller.ended().error is None
            assert caller.result.provenance.bundle_digest == world.bundle("second").digest
        for caller in crowd:
            caller.ended()


def test_when_the_new_engine_does_not_open_the_old_one_answers_what_waited(hosted):
    world = hosted.world
    _, queue = crowded(hosted)
    hosted.engines.fits = False
    hosted.engines.refuse["second"] = EngineFault("it will not load")
    errors = switching_in_vain(hosted, world.assignment("two", "second"))
    assert isinstance(errors[0], EngineFault)
    for caller in queue:
        assert caller.ended().result.provenance.bundle_digest == world.bundle("base").digest


def test_when_nothing_opens_what_waited_is_told(hosted):
    world = hosted.world
    _, queue = crowded(hosted)
    hosted.engines.fits = False
    hosted.engines.refuse = {n: EngineFault("no engine today") for n in ("base", "second")}
    errors = switching_in_vain(hosted, world.assignment("two", "second"))
    assert isinstance(errors[0], EngineFault)
    assert all(isinstance(caller.ended().error, Unavailable) for caller in queue)


def test_an_engine_whose_first_logits_are_no_numbers_is_not_served(hosted):
    world = hosted.world
    hosted.host.switch(world.assignment("one"))
    load = hosted.engines.load

    def broken(bundle_dir):
        engine = load(bundle_dir)
        engine._head[:] = float("nan")
        return engine

    hosted.engines.load = broken
    with pytest.raises(EngineFault, match="not numbers"):
        hosted.host.switch(world.assignment("two", "second"))
    hosted.engines.load = load
    result = hosted.client.generate("x", **OPTIONS)
    assert result.provenance.bundle_digest == world.bundle("base").digest
    wait_closed(hosted.engines, 1)


def test_a_waiting_request_that_moved_can_still_be_cancelled(hosted):
    world = hosted.world
    running, _ = crowded(hosted, waiting=0)
    ahead = Caller(hosted.client, "ahead")
    until(lambda: hosted.client.status().queued == 1)
    moves = Caller(hosted.client, "moves", request_id="moves")
    until(lambda: hosted.client.status().queued == 2)
    hosted.host.switch(world.assignment("two", "second"))
    until(lambda: hosted.client.status().rows_busy == 1)
    assert hosted.client.cancel("moves")
    hosted.engines.gate.set()
    result = moves.ended().result
    assert result.finish_reason is FinishReason.CANCELLED and result.token_ids == ()
    assert ahead.ended().result.provenance.bundle_digest == world.bundle("second").digest
    assert running[0].ended().result.finish_reason is FinishReason.LENGTH


def ended_of(host) -> tuple[int, int, float, float]:
    """Requests, failures, and of the records: how many and their seconds together."""
    metrics = host.metrics()
    (seconds,) = [h for h in host.histograms() if h.name == "request_seconds"]
    return (
        int(metrics["requests"]),
        int(metrics["failures"]),
        sum(seconds.counts),
        seconds.total,
    )


def test_a_call_cancelled_while_it_is_held_is_counted_and_recorded_as_any(hosted):
    world = hosted.world
    _, queue = crowded(hosted, waiting=2)
    gone = Caller(hosted.client, "gone", request_id="gone")
    until(lambda: hosted.client.status().queued == 3)
    hosted.engines.fits = False
    thread = switching(hosted, world.assignment("two", "second"))
    until(lambda: hosted.client.status().state == "loading")
    until(lambda: hosted.client.cancel("gone"))
    gone.ended()
    hosted.engines.gate.set()
    thread.join(30)
    for caller in queue:
        caller.ended()
    until(lambda: ended_of(hosted.host)[:3] == (4, 0, 4))


def test_calls_that_fail_while_they_are_held_are_counted_and_recorded(hosted):
    world = hosted.world
    running, queue = crowded(hosted)
    hosted.engines.fits = False
    hosted.engines.refuse = {n: EngineFault("no engine today") for n in ("base", "second")}
    switching_in_vain(hosted, world.assignment("two", "second"))
    for caller in (*running, *queue):
        caller.ended()
    until(lambda: ended_of(hosted.host)[:3] == (4, 3, 4))


def test_the_time_of_a_moved_call_counts_from_its_first_submission(hosted):
    _, queue = crowded(hosted, waiting=1)
    threading.Event().wait(0.3)
    hosted.host.switch(hosted.world.assignment("two", "second"))
    hosted.engines.gate.set()
    queue[0].ended()
    until(lambda: ended_of(hosted.host)[0] == 2)
    assert ended_of(hosted.host)[3] > 0.6


# -- held calls alone -----------------------------------------------------------------------


class Model:
    def __init__(self, error=None, calls=None):
        self.calls = calls
        self.submitted, self.cancelled, self._error = [], [], error

    def encode(self, prompt):
        return Encoded("", (*prompt.ids, 99))

    def grammar(self, call):
        self.compiled_beside_the_lock = self.calls is None or not self.calls._lock.locked()

    def resume(self, held, tokens, timeout_s, grammar):
        if self._error is not None:
            raise self._error
        self.submitted.append((held.request_id, tokens, timeout_s))

    def cancel(self, request_id):
        self.cancelled.append(request_id)
        return True


def held(name, events, deadline_s=None):
    call = GenerateCall(TokenPrompt((1, 2)))
    return HeldCall(name, call, 2, deadline_s, events.append, Provenance("b", "e"))


def test_calls_are_handed_over_in_order_tokenised_anew_with_the_time_that_is_left():
    calls, model = HeldCalls(), Model()
    calls.fill([held("a", []), held("b", [], deadline_s=17.0)])
    calls.hand_over(model, now=10.0)
    assert model.submitted == [("a", (1, 2, 99), None), ("b", (1, 2, 99), 7.0)]
    assert calls.cancel("a") and model.cancelled == ["a"]


def test_a_cancellation_need_not_wait_until_a_moving_call_is_compiled():
    calls = HeldCalls()
    model = Model(calls=calls)
    calls.fill([held("a", [])])
    calls.hand_over(model, 0.0)
    assert model.compiled_beside_the_lock


def test_a_call_cancelled_before_during_or_after_the_move_ends_once():
    early, late, events = [], [], []
    calls = HeldCalls(["early", "late", "stays"])
    assert calls.cancel("early") and not calls.cancel("stranger")
    calls.fill([held("early", early), held("late", late), held("stays", events)])
    assert calls.cancel("late") and not calls.cancel("late")
    model = Model()
    calls.hand_over(model, 0.0)
    assert [name for name, _, _ in model.submitted] == ["stays"]
    for heard in (early, late):
        accepted, end = heard
        assert isinstance(accepted, Accepted) and accepted.provenance == end.provenance
        expected = (FinishReason.CANCELLED, Usage(2, 0, 0), Timings(0.0, 0.0, 0.0, 0.0))
        assert isinstance(end, Finished) and (end.reason, end.usage, end.timings) == expected


def test_a_call_cancelled_while_it_is_tokenised_anew_ends_once_though_that_fails():
    events, calls = [], HeldCalls()

    class Failing(Model):
        def encode(self, prompt):
            assert calls.cancel("a")
            raise NotFound("no template")

    calls.fill([held("a", events)])
    calls.hand_over(Failing(), 0.0)
    _, end = events
    assert isinstance(end, Finished) and end.reason is FinishReason.CANCELLED


def test_nothing_is_heard_after_the_end_though_the_first_model_says_accepted_late():
    """Its step thread may not have greeted a call when that was withdrawn."""
    events, calls = [], HeldCalls()
    listen = AcceptedOnce(events.append)
    calls.fill([replace(held("a", events), on_event=listen)])
    assert calls.cancel("a")
    listen(Accepted("a", Provenance("b", "e")))
    assert [type(e) for e in events] == [Accepted, Finished]
    failed = []
    listen = AcceptedOnce(failed.append)
    listen(Failed(NotFound("no adapter")))
    listen(Accepted("a", Provenance("b", "e")))
    assert [type(e) for e in failed] == [Failed]


def test_what_the_next_model_refuses_hears_why_and_the_rest_goes_on():
    events = []
    calls = HeldCalls()
    calls.fill([held("a", events)])
    calls.hand_over(Model(NotFound("no adapter")), 0.0)
    assert isinstance(events[0], Failed) and isinstance(events[0].error, NotFound)


def test_without_a_next_model_all_are_told():
    events = []
    calls = HeldCalls()
    calls.fill([held("a", events), held("b", events)])
    calls.fail(Refused("nothing opens"))
    assert [type(e) for e in events] == [Failed, Failed] and len(calls) == 0
