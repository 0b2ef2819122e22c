"""A call's events on their way from the step thread to a reader that may be slow.

Putting never blocks and never waits for the reader; deltas of one answer that nobody has read yet
are joined into one, so a stream holds at most one Accepted, one PromptScored, one Delta and one end
of each answer, whatever the reader does (the text itself is bounded by the context). Knows no wire
format.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing

from remora_agent.runtime.api import (
    Accepted,
    Delta,
    Event,
    Failed,
    Finished,
    PromptScored,
    TokenLogprob,
)

StreamEvent = Accepted | PromptScored | Delta | Finished


class EventStream:
    """Of `choices` answers, each filled by the step thread, read once by a coroutine of `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, choices: int = 1) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._ready = asyncio.Event()
        self._unread = [_Unread() for _ in range(choices)]

    def put(self, event: Event, choice: int = 0) -> None:
        """Any thread. After the answer's end nothing more is taken."""
        unread = self._unread[choice]
        with self._lock:
            idle = not any(u.pending for u in self._unread)
            kept = unread.keep(event)
        if idle and kept:
            self._wake()

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """Of the one answer."""
        async with aclosing(self.choice_events()) as events:
            async for _, event in events:
                yield event

    async def choice_events(self) -> AsyncGenerator[tuple[int, StreamEvent], None]:
        """Which answer and what it says. Ends after the Finished of all, raises the error of the
        first Failed."""
        running = len(self._unread)
        while running:
            await self._ready.wait()
            for choice, event in self._take():
                if isinstance(event, Failed):
                    raise event.error
                yield choice, event
                running -= isinstance(event, Finished)

    def _take(self) -> list[tuple[int, Event]]:
        with self._lock:
            self._ready.clear()
            return [(i, event) for i, unread in enumerate(self._unread) for event in unread.take()]

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            # The loop has closed: the process is ending and nobody reads any more. The step
            # thread must not fail for that.
            return


class _Unread:
    """What one answer has said since it was last read."""

    def __init__(self) -> None:
        self._accepted: Accepted | None = None
        self._scored: PromptScored | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._end: Finished | Failed | None = None
        self._ended = False

    @property
    def pending(self) -> bool:
        return bool(self._accepted or self._scored or self._text or self._end)

    def keep(self, event: Event) -> bool:
        """False after the end."""
        if self._ended:
            return False
        if isinstance(event, Accepted):
            self._accepted = event
        elif isinstance(event, PromptScored):
            self._scored = event
        elif isinstance(event, Delta):
            self._text.append(event.text)
            self._token_ids.extend(event.token_ids)
            self._logprobs.extend(event.logprobs)
        else:
            self._end, self._ended = event, True
        return True

    def take(self) -> list[Event]:
        delta = None
        if self._text:
            delta = Delta("".join(self._text), tuple(self._token_ids), tuple(self._logprobs))
        taken: list[Event | None] = [self._accepted, self._scored, delta, self._end]
        self._accepted, self._scored, self._end = None, None, None
        self._text, self._token_ids, self._logprobs = [], [], []
        return [event for event in taken if event is not None]
