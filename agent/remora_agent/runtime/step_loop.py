"""The one thread that drives the engine: steps while there is work, sleeps while there is none,
runs what other threads ask for between two steps, and shows by a heartbeat that it lives.

Knows nothing of requests. An error that is no RemoraError is a bug of ours: the state can no longer
be trusted, so the loop ends, says so, and the process is to be restarted.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TypeVar

from remora_contract.errors import EngineFault, Exhausted, RemoraError, Unavailable

log = logging.getLogger(__name__)

T = TypeVar("T")
MAX_CALLS = 256
_ENDED = "the runtime has ended"
HEARTBEAT_S = 1.0  # at most this long without one while idle

# Does one step; None: there is more to do, else seconds that nothing will happen by itself.
Step = Callable[[], "float | None"]


@dataclass(frozen=True)
class _Call:
    run: Callable[[], None]
    refuse: Callable[[RemoraError], None] | None = None  # instead, when it will not be run


class StepLoop:
    def __init__(
        self, step: Step, on_exit: Callable[[RemoraError], None], clock: Callable[[], float]
    ) -> None:
        """`on_exit` runs last on the thread, with what requests that are left should hear."""
        self._step = step
        self._on_exit = on_exit
        self._clock = clock
        self._awake = threading.Condition()
        self._woken = False
        self._stopping = False
        self._failed = False
        self._ended = False
        self._calls: deque[_Call] = deque()
        self._heartbeat_s = clock()
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def failed(self) -> bool:
        """The thread died of a bug; it does not come back."""
        return self._failed

    def heartbeat_age_s(self) -> float:
        """Since the thread last finished a step or woke: at most about a second more than the
        longest step while all is well."""
        return max(0.0, self._clock() - self._heartbeat_s)

    def wake(self) -> None:
        """There may be something to do."""
        with self._awake:
            self._woken = True
            self._awake.notify()

    def post(self, run: Callable[[], None]) -> None:
        """Runs it between two steps; nothing happens when the loop has ended. For callers whose
        number is bounded; `run` raises nothing."""
        with self._awake:
            self._enqueue(_Call(run))

    def call(self, run: Callable[[], T], timeout_s: float) -> T:
        """Runs it between two steps and returns what it returns or raises (a RemoraError).

        Raises Exhausted when too many calls wait, Unavailable after the time or when the loop has
        ended. Not on the step thread itself.
        """
        answer: Future[T] = Future()
        with self._awake:
            if self._ended:
                raise Unavailable(_ENDED)
            if len(self._calls) >= MAX_CALLS:
                raise Exhausted(f"{MAX_CALLS} calls wait for the engine", retry_after_s=1.0)
            self._enqueue(_Call(lambda: _settle(answer, run), answer.set_exception))
        return wait_for(answer, timeout_s)

    def stop(self) -> None:
        """Ends the thread after the step it is in, and waits for it."""
        with self._awake:
            self._stopping = True
            self._awake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        clean = False
        try:
            self._loop()
            clean = True
        finally:
            # No except clause: the traceback of a bug goes to threading.excepthook as it is.
            self._failed = not clean
            self._end()
            if clean:
                self._on_exit(Unavailable("the runtime is shutting down"))
            else:
                log.critical("step_loop.died")
                self._on_exit(EngineFault("the step thread died; restart the agent"))

    def _enqueue(self, call: _Call) -> None:
        self._calls.append(call)
        self._woken = True
        self._awake.notify()

    def _end(self) -> None:
        """Nobody waits for a call that will not run."""
        with self._awake:
            self._ended = True
            calls, self._calls = self._calls, deque()
        for call in calls:
            if call.refuse is not None:
                call.refuse(Unavailable(_ENDED))

    def _loop(self) -> None:
        while True:
            self._run_calls()
            if self._stopping:
                return
            idle_s = self._step()
            if idle_s is not None:
                self._sleep(idle_s)
            self._heartbeat_s = self._clock()

    def _run_calls(self) -> None:
        with self._awake:
            calls, self._calls = self._calls, deque()
        for call in calls:
            call.run()

    def _sleep(self, seconds: float) -> None:
        with self._awake:
            self._awake.wait_for(lambda: self._woken or self._stopping, min(seconds, HEARTBEAT_S))
            self._woken = False


def wait_for(answer: Future[T], timeout_s: float) -> T:
    """Raises Unavailable when it takes longer."""
    try:
        return answer.result(timeout_s)
    except FutureTimeout as e:
        raise Unavailable(f"the engine did not get to it within {timeout_s:g} s") from e


def _settle(answer: Future[T], run: Callable[[], T]) -> None:
    try:
        answer.set_result(run())
    except RemoraError as e:
        answer.set_exception(e)
