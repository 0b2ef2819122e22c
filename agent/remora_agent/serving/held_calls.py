"""Calls that one model gave up before it began with them, on their way to the next.

Each ends exactly once: answered by the model it is handed to, cancelled, or failed. Its listener
sees nothing of the move. Knows no engine and no wire format.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from remora_agent.runtime.api import (
    Accepted,
    Failed,
    Finished,
    FinishReason,
    OnEvent,
    Provenance,
    Timings,
    Usage,
)
from remora_agent.runtime.constraint import Grammar
from remora_agent.serving.call import GenerateCall, PromptInput
from remora_agent.text.pipeline import Encoded
from remora_contract.errors import RemoraError


@dataclass(frozen=True)
class HeldCall:
    request_id: str
    call: GenerateCall
    prompt_tokens: int
    deadline_s: float | None  # on the clock that `hand_over` is given
    on_event: OnEvent  # behind the process's counts and records
    provenance: Provenance  # of the model that gave it up


class NextModel(Protocol):
    """What `ServedModel` is to the calls it takes over."""

    def encode(self, prompt: PromptInput) -> Encoded: ...

    def grammar(self, call: GenerateCall) -> Grammar | None: ...

    def resume(
        self,
        held: HeldCall,
        tokens: tuple[int, ...],
        timeout_s: float | None,
        grammar: Grammar | None,
    ) -> None: ...

    def cancel(self, request_id: str) -> bool: ...


class HeldCalls:
    """Thread-safe. `fill` once, then one of `hand_over`, `hand_back` and `fail`."""

    def __init__(self, expected: Collection[str] = (), observe: OnEvent | None = None) -> None:
        """`expected` may be cancelled before they are here. `observe` hears the end of each that
        ends here, before its own listener."""
        self._observe = observe
        self._lock = threading.Lock()
        self._expected = frozenset(expected)
        self._early: set[str] = set()  # cancelled before they were here
        self._held: dict[str, HeldCall] = {}
        self._model: NextModel | None = None

    def __len__(self) -> int:
        return len(self._held)

    def fill(self, calls: Sequence[HeldCall]) -> None:
        with self._lock:
            early, self._early, self._expected = self._early, set(), frozenset()
            self._held = {c.request_id: c for c in calls if c.request_id not in early}
        for held in calls:
            if held.request_id in early:
                self._end(held, _cancelled(held))

    def cancel(self, request_id: str) -> bool:
        """Whether it was found, here or with the model that has taken over."""
        with self._lock:
            if request_id in self._expected:
                self._early.add(request_id)
                return True
            held, model = self._held.pop(request_id, None), self._model
        if held is not None:
            self._end(held, _cancelled(held))
            return True
        return model is not None and model.cancel(request_id)

    def hand_over(self, model: NextModel, now: float) -> None:
        """In the order in which they came; tokenised anew, because the model may be another.

        Takes as long as the prompts are long. One that `model` refuses fails with its reason.
        """
        with self._lock:
            self._model = model
        self.hand_back(model, now)

    def hand_back(self, model: NextModel, now: float) -> None:
        """The same to the model that gave them up, which finds them by itself from then on."""
        with self._lock:
            waiting = list(self._held.values())
        for held in waiting:
            self._submit(held, model, now)

    def fail(self, error: RemoraError) -> None:
        with self._lock:
            left, self._held = list(self._held.values()), {}
        for held in left:
            self._end(held, Failed(error))

    def _submit(self, held: HeldCall, model: NextModel, now: float) -> None:
        left_s = None if held.deadline_s is None else held.deadline_s - now
        try:
            tokens = model.encode(held.call.prompt).token_ids
            grammar = model.grammar(held.call)
        except RemoraError as e:
            if self._take(held):
                self._end(held, Failed(e))
            return
        try:
            with self._lock:  # a cancellation sees it here or there, never nowhere
                if self._held.pop(held.request_id, None) is not None:
                    model.resume(held, tokens, left_s, grammar)
        except RemoraError as e:
            self._end(held, Failed(e))

    def _end(self, held: HeldCall, event: Finished | Failed) -> None:
        if self._observe is not None:
            self._observe(event)
        if isinstance(event, Finished):  # it comes after Accepted, which nobody may have said yet
            held.on_event(Accepted(held.request_id, held.provenance))
        held.on_event(event)

    def _take(self, held: HeldCall) -> bool:
        """False when it was cancelled meanwhile: it has heard its end."""
        with self._lock:
            return self._held.pop(held.request_id, None) is not None


def _cancelled(held: HeldCall) -> Finished:
    usage, timings = Usage(held.prompt_tokens, 0, 0), Timings(0.0, 0.0, 0.0, 0.0)
    return Finished(FinishReason.CANCELLED, usage, timings, held.provenance)
