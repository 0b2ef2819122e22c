"""One request's events on their way from the step thread to a reader that may be slow.

`put` never blocks and never waits for the reader; deltas nobody has read yet are joined into one,
so a stream holds at most one Accepted, one PromptScored, one Delta and one end, whatever the reader
does (the text itself is bounded by the context). Knows no wire format.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator

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
    """Filled by the step thread with `put`, read once by a coroutine of `loop`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._ready = asyncio.Event()
        self._accepted: Accepted | None = None
        self._scored: PromptScored | None = None
        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._end: Finished | Failed | None = None

    def put(self, event: Event) -> None:
        """Any thread. After the end nothing more is taken."""
        with self._lock:
            if self._end is not None:
                return
            idle = not self._pending()
            self._keep(event)
        if idle:
            self._wake()

    async def events(self) -> AsyncGenerator[StreamEvent, None]:
        """Ends after Finished. Raises the error of a Failed."""
        while True:
            await self._ready.wait()
            for event in self._take():
                if isinstance(event, Failed):
                    raise event.error
                yield event
                if isinstance(event, Finished):
                    return

    def _keep(self, event: Event) -> None:
        if isinstance(event, Accepted):
            self._accepted = event
        elif isinstance(event, PromptScored):
            self._scored = event
        elif isinstance(event, Delta):
            self._text.append(event.text)
            self._token_ids.extend(event.token_ids)
            self._logprobs.extend(event.logprobs)
        else:
            self._end = event

    def _pending(self) -> bool:
        return bool(self._accepted or self._scored or self._text or self._end)

    def _take(self) -> list[Event]:
        with self._lock:
            self._ready.clear()
            taken: list[Event | None] = [self._accepted, self._scored, self._delta(), self._end]
            self._accepted, self._scored = None, None
            self._text, self._token_ids, self._logprobs = [], [], []
            return [event for event in taken if event is not None]

    def _delta(self) -> Delta | None:
        if not self._text:
            return None
        return Delta("".join(self._text), tuple(self._token_ids), tuple(self._logprobs))

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:
            # The loop has closed: the process is ending and nobody reads any more. The step
            # thread must not fail for that.
            return
