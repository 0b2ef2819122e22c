"""One record of each request that has ended, of which request log, histograms and traces are made.

Made from the events that the request's listener hears, on the step thread, before the listener
hears the last one. Holds no text unless asked for. Knows neither log nor metric formats.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from remora_agent.runtime.api import (
    Accepted,
    AnsweringAdapter,
    Delta,
    Event,
    Failed,
    Finished,
    GenerationRequest,
    OnEvent,
    Timings,
    Usage,
)

log = logging.getLogger(__name__)
MAX_TEXT_CHARS = 16_384  # of an answer in a record


@dataclass(frozen=True)
class Origin:
    """What a request does not say of itself."""

    model: str
    use_case: str = ""
    trace_parent: str = ""  # W3C traceparent of the caller; empty: none
    prompt_text: str | None = None  # None: texts are not kept


@dataclass(frozen=True)
class RequestRecord:
    request_id: str
    client: str  # whom the request names
    caller: str  # who was connected
    origin: Origin
    began_unix_s: float
    total_s: float
    outcome: str  # stop, length, cancelled, or the status code of the error
    error: str
    adapters: tuple[AnsweringAdapter, ...]
    usage: Usage
    timings: Timings | None  # None: it failed
    stop_match: str
    answer_text: str | None  # None: texts are not kept


Sink = Callable[[RequestRecord], None]


class RequestRecords:
    """Thread-safe: it holds nothing that changes. `sinks` get every record, quickly, on the step
    thread; `gap` hears the seconds between two tokens of a request. `texts`: whether records hold
    prompts and answers."""

    def __init__(
        self,
        sinks: Sequence[Sink] = (),
        gap: Callable[[float], None] | None = None,
        *,
        texts: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._sinks = tuple(sinks)
        self._gap = gap
        self.texts = texts
        self._clock, self._wall_clock = clock, wall_clock

    def listening(self, request: GenerationRequest, origin: Origin, on_event: OnEvent) -> OnEvent:
        """`on_event` behind a recorder."""
        if not self._sinks and self._gap is None:
            return on_event
        recording = _Recording(request, origin, self._clock(), self._wall_clock())

        def listen(event: Event) -> None:
            now = self._clock()
            gap_s = recording.hear(event, now)
            if gap_s is not None and self._gap is not None:
                self._gap(gap_s)
            if isinstance(event, Finished | Failed):
                record = recording.ended(event, now)
                for sink in self._sinks:
                    sink(record)
            on_event(event)

        return listen


@dataclass
class _Recording:
    request: GenerationRequest
    origin: Origin
    began_s: float
    began_unix_s: float
    adapters: tuple[AnsweringAdapter, ...] = ()
    tokens: int = 0
    last_s: float | None = None  # of the last delta
    text: list[str] = field(default_factory=list)
    chars: int = 0

    def hear(self, event: Event, now: float) -> float | None:
        """Seconds since the delta before, for each of this one's tokens together; None without."""
        if isinstance(event, Accepted):
            self.adapters = event.provenance.adapters
        if not isinstance(event, Delta) or not event.token_ids:
            return None
        gap_s = None if self.last_s is None else (now - self.last_s) / len(event.token_ids)
        self.last_s = now
        self.tokens += len(event.token_ids)
        if self.origin.prompt_text is not None and self.chars < MAX_TEXT_CHARS:
            self.text.append(event.text[: MAX_TEXT_CHARS - self.chars])
            self.chars += len(self.text[-1])
        return gap_s

    def ended(self, event: Finished | Failed, now: float) -> RequestRecord:
        done = event if isinstance(event, Finished) else None
        return RequestRecord(
            request_id=self.request.request_id,
            client=self.request.share.client,
            caller=self.request.share.owner,
            origin=self.origin,
            began_unix_s=self.began_unix_s,
            total_s=now - self.began_s,
            outcome=event.reason.value if isinstance(event, Finished) else event.error.code,
            error="" if isinstance(event, Finished) else str(event.error),
            adapters=done.provenance.adapters if done else self.adapters,
            usage=done.usage if done else Usage(len(self.request.prompt), 0, self.tokens),
            timings=done.timings if done else None,
            stop_match=done.stop_match if done else "",
            answer_text=None if self.origin.prompt_text is None else "".join(self.text),
        )
