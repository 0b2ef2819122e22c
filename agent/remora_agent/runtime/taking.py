"""Draws tokens of what a step has found, and says which requests are complete. It ends none itself.

For the step thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from remora_agent.runtime.answer import TokenTaken
from remora_agent.runtime.api import FinishReason
from remora_agent.runtime.computing import Found
from remora_agent.runtime.metrics import RuntimeMetrics
from remora_agent.runtime.request import Request
from remora_agent.runtime.sampling import Logits
from remora_agent.runtime.shortlist import ShortRow
from remora_contract.errors import RemoraError

# A request's id, how many drafted tokens were computed, how many of them were drawn.
OnDrafted = Callable[[str, int, int], None]


class Taking:
    def __init__(
        self,
        metrics: RuntimeMetrics,
        on_drafted: OnDrafted,
        fail: Callable[[Request, RemoraError], None],
        cancel: Callable[[str], object],
    ) -> None:
        """`fail` ends a request from which no token can be drawn; `cancel`: nobody hears it."""
        self._metrics = metrics
        self._on_drafted = on_drafted
        self._fail = fail
        self._cancel = cancel

    def take(
        self, requests: Sequence[Request], found: Iterable[Found], engine_s: float, now: float
    ) -> list[tuple[Request, FinishReason]]:
        """Tokens for each, all counted; the requests that are complete with them."""
        pairs = [
            (request, taken)
            for request, of_one in zip(requests, found, strict=False)
            for taken in self._all(request, of_one, now)
        ]
        if not requests[0].job.is_spare:
            self._count([taken for _, taken in pairs], engine_s)
        return [(request, taken.reason) for request, taken in pairs if taken.reason is not None]

    def _count(self, taken: Sequence[TokenTaken], engine_s: float) -> None:
        between = [t.since_last_s for t in taken if not t.first]
        self._metrics.step(len(taken), engine_s, between)
        for first in (t for t in taken if t.first):
            self._metrics.first_token(first.since_last_s)

    def _all(self, request: Request, found: Found, now: float) -> list[TokenTaken]:
        """A token of each position, as long as it is the draft's."""
        answer, tokens = request.generating, list[TokenTaken]()
        for seen, drafted in zip(found.logits, (*found.draft, None), strict=True):
            taken = self._one(request, seen, now)
            if taken is None:
                return tokens
            tokens.append(taken)
            if taken.reason is not None or answer.tokens[-1] != drafted:
                break
        if found.draft:
            self._metrics.drafted(len(found.draft), len(tokens) - 1)
            self._on_drafted(request.id, len(found.draft), len(tokens) - 1)
        return tokens

    def _one(self, request: Request, seen: Logits | ShortRow, now: float) -> TokenTaken | None:
        try:
            taken = request.generating.take(seen, now)
        except RemoraError as e:
            self._fail(request, e)
            return None
        if request.generating.deaf:
            self._cancel(request.id)
        return taken
