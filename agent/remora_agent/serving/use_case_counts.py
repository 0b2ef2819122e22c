"""How often requests name each use case, and how many tokens that takes.

Counted from the events that a request's listener hears, so a request that was never accepted does
not count. Names come from callers: how many are told apart is bounded, the rest is one entry.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import reduce

from remora_agent.runtime.api import Delta, Event, Failed, Finished, OnEvent

MAX_COUNTED = 1024  # use cases told apart
MAX_LABELS = 32  # of them as labels of metrics: a controller keeps 256 series of a device
OTHER = "(other)"  # no use case can be named so


@dataclass(frozen=True)
class UseCaseCount:
    requests: int = 0  # ended, failed ones included
    failures: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def plus(self, other: UseCaseCount) -> UseCaseCount:
        return UseCaseCount(
            self.requests + other.requests,
            self.failures + other.failures,
            self.prompt_tokens + other.prompt_tokens,
            self.tokens + other.tokens,
        )


class UseCaseCounts:
    """Thread-safe. Lives as long as the process, over switches of models."""

    def __init__(self, max_counted: int = MAX_COUNTED, max_labels: int = MAX_LABELS) -> None:
        self._max_counted, self._max_labels = max_counted, max_labels
        self._lock = threading.Lock()
        self._counts: dict[str, UseCaseCount] = {}  # in the order of their first request

    def listening(self, name: str, prompt_tokens: int, on_event: OnEvent) -> OnEvent:
        """`on_event` behind a listener that counts the request under the use case `name`. It is
        counted before anybody hears that it has ended."""
        heard = 0

        def listen(event: Event) -> None:
            nonlocal heard
            if isinstance(event, Delta):
                heard += len(event.token_ids)
            elif isinstance(event, Finished):
                usage = event.usage
                self._add(name, UseCaseCount(1, 0, usage.prompt_tokens, usage.completion_tokens))
            elif isinstance(event, Failed):
                self._add(name, UseCaseCount(1, 1, prompt_tokens, heard))
            on_event(event)

        return listen

    def all(self) -> tuple[tuple[str, UseCaseCount], ...]:
        """Name and count of each, in the order of their first request, OTHER last."""
        with self._lock:
            counts = dict(self._counts)
        other = counts.pop(OTHER, None)
        return (*counts.items(), *(() if other is None else ((OTHER, other),)))

    def metrics(self) -> dict[str, float]:
        """`use_case_requests.NAME` and so on; which names have their own never changes."""
        found = self.all()
        told = dict([(n, c) for n, c in found if n != OTHER][: self._max_labels])
        rest = [c for n, c in found if n not in told]
        if rest:
            told[OTHER] = reduce(UseCaseCount.plus, rest)
        return {
            f"{metric}.{name}": float(value)
            for name, count in told.items()
            for metric, value in (
                ("use_case_requests", count.requests),
                ("use_case_failures", count.failures),
                ("use_case_tokens", count.tokens),
            )
        }

    def _add(self, name: str, more: UseCaseCount) -> None:
        with self._lock:
            known = self._counts.get(name)
            if known is None and len(self._counts) >= self._max_counted:
                name, known = OTHER, self._counts.get(OTHER)
            self._counts[name] = more if known is None else known.plus(more)
