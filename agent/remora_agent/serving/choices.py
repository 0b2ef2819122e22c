"""The answers to one call: their ids in the runtime, and what their reader sees of them. Pure."""

from __future__ import annotations

from dataclasses import replace

from remora_agent.runtime.api import Accepted, Delta, Finished
from remora_agent.serving.call import GenerateCall
from remora_agent.serving.event_stream import StreamEvent


def choice_ids(request_id: str, n: int) -> tuple[str, ...]:
    """One for each answer; the only one has the request's own."""
    return (request_id,) if n == 1 else tuple(f"{request_id}#{i}" for i in range(n))


def choice_call(call: GenerateCall, index: int) -> GenerateCall:
    """The call that asks for answer `index` alone; a seed that passes 64 bits goes on from 0. The
    prompt's scores are those of all answers: only the first asks for them."""
    seed, scoring = call.sampling.seed, call.scoring
    if index:
        scoring = replace(scoring, prompt_top=None)
    if call.n > 1 and seed is not None:
        seed = (seed + index) % (1 << 64)
    return replace(call, n=1, scoring=scoring, sampling=replace(call.sampling, seed=seed))


class Showing:
    """What the reader of a call sees: Accepted under the id by which it may cancel, and with
    `echo` the prompt's text before each answer's own, without tokens."""

    def __init__(self, request_id: str, echo: str | None = None) -> None:
        self._request_id, self._echo = request_id, echo
        self._begun: set[int] = set()

    def __call__(self, choice: int, event: StreamEvent) -> tuple[StreamEvent, ...]:
        if isinstance(event, Accepted):
            return (replace(event, request_id=self._request_id),)
        if not isinstance(event, (Delta, Finished)) or choice in self._begun:
            return (event,)
        self._begun.add(choice)
        return (Delta(self._echo, ()), event) if self._echo else (event,)
