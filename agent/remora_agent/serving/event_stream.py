"""A call's events on their way from the step thread to a reader that may be slow.

Putting never blocks and never waits for the reader; deltas of one answer that nobody has read yet
are joined, JOINED_TOKENS at most into one, so that it still fits a message. A stream holds at most
one Accepted, one PromptScored, these deltas and one end of each answer, whatever the reader does
(the text itself is bounded by the context). Answers of one call share their prompt: what one says
of it, all say. Knows no wire format.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from remora_agent.runtime.api import (
    Accepted,
    Delta,
    Event,
    Failed,
    Finished,
    OnEvent,
    PromptScored,
    TokenLogprob,
)

StreamEvent = Accepted | PromptScored | Delta | Finished
# With the scores of 21 tokens for each, about 1 MB of a message's 4.
JOINED_TOKENS = 4096


class EventStream:
    """Of `choices` answers, each filled by the step thread, read once by a coroutine of `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop, choices: int = 1) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._ready = asyncio.Event()
        self._unread = [_Unread() for _ in range(choices)]

    def put(self, event: Event, choice: int = 0) -> None:
        """Any thread. After the answer's end nothing more is taken."""
        saying = self._unread if isinstance(event, PromptScored) else [self._unread[choice]]
        with self._lock:
            idle = not any(u.pending for u in self._unread)
            kept = [unread.keep(event) for unread in saying]
        if idle and any(kept):
            self._wake()

    def listeners(self) -> list[OnEvent]:
        """One for each answer."""
        return [partial(self.put, choice=i) for i in range(len(self._unread))]

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
        self._deltas: list[_Joined] = []
        self._end: Finished | Failed | None = None
        self._ended = False

    @property
    def pending(self) -> bool:
        return bool(self._accepted or self._scored or self._deltas or self._end)

    def keep(self, event: Event) -> bool:
        """False after the end."""
        if self._ended:
            return False
        if isinstance(event, Accepted):
            self._accepted = event
        elif isinstance(event, PromptScored):
            self._scored = event
        elif isinstance(event, Delta):
            if not self._deltas or self._deltas[-1].full:
                self._deltas.append(_Joined())
            self._deltas[-1].add(event)
        else:
            self._end, self._ended = event, True
        return True

    def take(self) -> list[Event]:
        deltas = [joined.delta() for joined in self._deltas]
        taken: list[Event | None] = [self._accepted, self._scored, *deltas, self._end]
        self._accepted, self._scored, self._end = None, None, None
        self._deltas = []
        return [event for event in taken if event is not None]


class _Joined:
    """Deltas that become one."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def full(self) -> bool:
        return len(self._token_ids) >= JOINED_TOKENS

    def add(self, delta: Delta) -> None:
        self._text.append(delta.text)
        self._token_ids.extend(delta.token_ids)
        self._logprobs.extend(delta.logprobs)

    def delta(self) -> Delta:
        return Delta("".join(self._text), tuple(self._token_ids), tuple(self._logprobs))
