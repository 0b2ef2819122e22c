"""The thread: sleeps without spinning, runs calls between steps, beats, ends cleanly."""

import threading
import time

import pytest

from remora_agent.runtime.step_loop import MAX_CALLS, StepLoop
from remora_contract.errors import Exhausted, NotFound, Unavailable


@pytest.fixture
def run():
    loops = []

    def make(step, on_exit=lambda error: None):
        loop = StepLoop(step, on_exit, time.monotonic)
        loops.append(loop)
        loop.start()
        return loop

    yield make
    for loop in loops:
        loop.stop()


def test_an_idle_loop_does_not_spin_and_wakes_when_told(run):
    steps, twice = [], threading.Event()

    def step():
        steps.append(1)
        if len(steps) > 1:
            twice.set()
        return float("inf")

    loop = run(step)
    assert loop.call(lambda: 7, 20) == 7
    loop.wake()
    assert twice.wait(20) and len(steps) < 20


def test_a_busy_loop_steps_until_there_is_nothing_more(run):
    left, done = list(range(100)), threading.Event()

    def step():
        if not left:
            done.set()
            return float("inf")
        left.pop()
        return None

    run(step)
    assert done.wait(20)


def test_a_call_runs_on_the_thread_and_its_error_comes_back(run):
    loop = run(lambda: float("inf"))
    assert loop.call(lambda: threading.current_thread().name, 20) == "step-loop"

    def refuse():
        raise NotFound("nobody")

    with pytest.raises(NotFound, match="nobody"):
        loop.call(refuse, 20)
    assert loop.call(lambda: 1, 20) == 1


def test_calls_are_bounded_and_time_out_while_a_step_lasts(run):
    go, begun = threading.Event(), threading.Event()

    def step():
        begun.set()
        go.wait(20)
        return float("inf")

    loop = run(step)
    assert begun.wait(20)
    with pytest.raises(Unavailable, match="within"):
        loop.call(lambda: 1, 0.001)
    ran = threading.Event()
    for _ in range(MAX_CALLS - 2):
        loop.post(lambda: None)
    loop.post(ran.set)
    with pytest.raises(Exhausted):
        loop.call(lambda: 1, 0.001)
    go.set()
    assert ran.wait(20)
    assert loop.call(lambda: 1, 20) == 1


def test_the_heartbeat_ages_while_a_step_hangs(run):
    go, begun = threading.Event(), threading.Event()

    def step():
        begun.set()
        go.wait(20)
        return float("inf")

    times = {"now": 0.0}
    loop = StepLoop(step, lambda error: None, lambda: times["now"])
    loop.start()
    assert begun.wait(20)
    times["now"] = 90.0
    assert loop.heartbeat_age_s() == 90.0
    go.set()
    loop.call(lambda: 1, 20)
    loop.wake()
    loop.stop()
    assert loop.heartbeat_age_s() == 0.0


def test_stopping_tells_why_once_and_refuses_later_calls(run):
    heard = []
    loop = run(lambda: float("inf"), heard.append)
    loop.stop()
    loop.stop()
    assert len(heard) == 1 and isinstance(heard[0], Unavailable)
    with pytest.raises(Unavailable):
        loop.call(lambda: 1, 20)
    assert not loop.failed


def test_a_bug_ends_the_loop_and_is_reported(run, monkeypatch):
    caught, heard, ended = [], [], threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: caught.append(args.exc_type))

    def step():
        raise ZeroDivisionError

    def on_exit(error):
        heard.append(error)
        ended.set()

    loop = run(step, on_exit)
    assert ended.wait(20)
    loop.stop()
    assert loop.failed and caught == [ZeroDivisionError] and "restart" in str(heard[0])
