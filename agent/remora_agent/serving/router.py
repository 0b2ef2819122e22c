"""Which model new calls go to, exactly: each call enters one model and no call falls in between.

A call *enters* for the moment it takes to tokenise and submit, then leaves; its generation is the
model's own affair. A switch replaces the model (calls go to the new one from that instant) or,
where two do not fit in memory, holds calls in a bounded queue until the new one stands. Knows
nothing of what a model is.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Generic, TypeVar

from remora_contract.errors import Exhausted, Unavailable

M = TypeVar("M")


class Router(Generic[M]):
    """`hold_limit`: most calls kept waiting while there is no model; more are refused."""

    def __init__(self, hold_limit: int = 256, retry_after_s: float = 5.0) -> None:
        self._changed = threading.Condition()
        self._current: M | None = None
        self._entered: Counter[int] = Counter()  # by id(model): calls between enter and leave
        self._waiting: deque[Future[M]] = deque()
        self._held = False
        self._closed = False
        self._hold_limit = hold_limit
        self._retry_after_s = retry_after_s

    @property
    def current(self) -> M | None:
        """What answers now; also while calls are held. For status, not for submitting."""
        with self._changed:
            return self._current

    @property
    def state(self) -> str:
        """loading, serving or draining."""
        with self._changed:
            if self._closed:
                return "draining"
            return "serving" if self._current is not None and not self._held else "loading"

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(not ticket.cancelled() for ticket in self._waiting)

    @asynccontextmanager
    async def entering(self) -> AsyncIterator[M]:
        """The model to submit to. Waits while calls are held. Raises Unavailable, Exhausted."""
        ticket = self._enter()
        try:
            model = await asyncio.wrap_future(ticket)
        except asyncio.CancelledError:
            # It may have been let in, or refused, at the same instant.
            if not ticket.cancel() and ticket.exception() is None:
                self._leave(ticket.result())
            raise
        try:
            yield model
        finally:
            self._leave(model)

    @contextmanager
    def entering_blocking(self) -> Iterator[M]:
        """The same for a caller without an event loop."""
        model = self._enter().result()
        try:
            yield model
        finally:
            self._leave(model)

    def replace(self, model: M) -> M | None:
        """From now on calls go to `model`, held ones first.

        Returns the old one when no call is on its way into it any more; its generations may run.
        """
        with self._changed:
            old, self._current, self._held = self._current, model, False
            while self._waiting:
                self._admit(self._waiting.popleft(), model)
            if old is not None and old is not model:
                self._changed.wait_for(lambda: self._entered[id(old)] == 0)
            return old

    def hold(self) -> M | None:
        """From now on calls wait. Returns the current model when no call is on its way into it."""
        with self._changed:
            self._held = True
            model = self._current
            if model is not None:
                self._changed.wait_for(lambda: self._entered[id(model)] == 0)
            return model

    def clear(self, reason: str) -> None:
        """There is no model any more: held and new calls fail with Unavailable."""
        with self._changed:
            self._current, self._held = None, False
            self._fail_waiting(Unavailable(reason))

    def close(self) -> None:
        """Nothing is admitted any more; held calls fail with Unavailable."""
        with self._changed:
            self._closed = True
            self._fail_waiting(_draining())

    def _enter(self) -> Future[M]:
        ticket: Future[M] = Future()
        with self._changed:
            if self._closed:
                raise _draining()
            if self._held:
                self._wait_in_line(ticket)
            elif self._current is None:
                raise Unavailable("no model is loaded yet; try again when the agent is ready")
            else:
                self._admit(ticket, self._current)
        return ticket

    def _wait_in_line(self, ticket: Future[M]) -> None:
        self._waiting = deque(t for t in self._waiting if not t.cancelled())
        if len(self._waiting) >= self._hold_limit:
            raise Exhausted(
                f"the model is being switched and {self._hold_limit} calls wait already; "
                "try again later",
                self._retry_after_s,
            )
        self._waiting.append(ticket)

    def _admit(self, ticket: Future[M], model: M) -> None:
        if ticket.set_running_or_notify_cancel():
            self._entered[id(model)] += 1
            ticket.set_result(model)

    def _leave(self, model: M) -> None:
        with self._changed:
            self._entered[id(model)] -= 1
            if self._entered[id(model)] == 0:
                del self._entered[id(model)]
            self._changed.notify_all()

    def _fail_waiting(self, error: Unavailable) -> None:
        while self._waiting:
            ticket = self._waiting.popleft()
            if ticket.set_running_or_notify_cancel():
                ticket.set_exception(error)


def _draining() -> Unavailable:
    return Unavailable("this agent is shutting down; try another or try again later")
