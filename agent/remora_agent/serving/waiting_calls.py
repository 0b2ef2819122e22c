"""The calls that a model has taken and not begun with, so that they can be given to another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from remora_agent.runtime.api import Accepted, Event, OnEvent
from remora_agent.serving.held_calls import HeldCall, HeldCalls

# Ids that may leave, who is asked about them from then on -> those that left.
Withdraw = Callable[[Collection[str], Callable[[str], bool]], tuple[str, ...]]


class AcceptedOnce:
    """A listener of a call that may move: it is accepted by the first model that says so. What the
    call's other models say of it comes from other threads, each beginning with Accepted too: of a
    call that ended on its way, the model that gave it up says so perhaps after the end."""

    def __init__(self, on_event: OnEvent) -> None:
        self._lock = threading.Lock()
        self._told = False
        self._on_event = on_event

    def __call__(self, event: Event) -> None:
        if isinstance(event, Accepted):
            with self._lock:
                told, self._told = self._told, True
                if told:
                    return
                self._on_event(event)  # before anybody's next event
        else:
            if not self._told:
                with self._lock:
                    self._told = True
            self._on_event(event)


class WaitingCalls:
    """Thread-safe. A call is here from its submission to what it hears after Accepted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[str, HeldCall] = {}

    @contextmanager
    def adding(self, held: HeldCall) -> Iterator[None]:
        """Around the submission; when that raises, the call is not here."""
        with self._lock:
            self._calls.setdefault(held.request_id, held)  # an id in use is refused inside
        try:
            yield
        except BaseException:
            self._drop(held)
            raise

    def watching(self, held: HeldCall, on_event: OnEvent) -> OnEvent:
        """`on_event`, which takes the call from here with what comes after Accepted."""
        begun = False

        def listen(event: Event) -> None:
            nonlocal begun
            if not begun and not isinstance(event, Accepted):
                begun = True
                self._drop(held)
            on_event(event)

        return listen

    def give_up(self, withdraw: Withdraw, observe: OnEvent | None = None) -> HeldCalls:
        """What `withdraw` lets go; `observe` as HeldCalls has it."""
        with self._lock:
            known = frozenset(self._calls)
        held = HeldCalls(known, observe)
        gone = withdraw(known, held.cancel)
        with self._lock:
            calls = [self._calls.pop(request_id) for request_id in gone]
        held.fill(calls)
        return held

    def _drop(self, held: HeldCall) -> None:
        with self._lock:
            if self._calls.get(held.request_id) is held:
                del self._calls[held.request_id]
