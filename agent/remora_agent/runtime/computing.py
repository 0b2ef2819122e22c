"""What a step computes for its requests: chunks of prompts, tokens of answers, drafts to prove.

Knows what to ask of the engine and what its logits are for; takes no token and ends no request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from remora_agent.engine.protocol import Engine, RowStep
from remora_agent.runtime.embedding import Embedding
from remora_agent.runtime.prompt_scoring import read_scored
from remora_agent.runtime.request import Request
from remora_agent.runtime.sampling import Logits
from remora_agent.runtime.scheduler import DecodeStep, PrefillChunk, Work
from remora_agent.runtime.speculation import Speculation


@dataclass(frozen=True)
class Found:
    """What a step has computed for one request: logits of consecutive positions, the i-th of which
    counts when the token before it is the `draft`'s i-th."""

    logits: Logits  # [1 + len(draft), vocab]
    draft: tuple[int, ...] = ()


class Computing:
    def __init__(self, engine: Engine, speculation: Speculation) -> None:
        self._engine = engine
        self._speculation = speculation

    def run(self, work: Work, requests: Sequence[Request]) -> list[Found]:
        """The logits of each request that gets a token. Raises what the engine raises."""
        if isinstance(work, PrefillChunk):
            return self._read(work, requests[0])
        if len(requests) == 1:
            return [self._alone(work.rows[0], requests[0])]
        return [Found(logits[None]) for logits in self._decode(work, requests)]

    def _read(self, work: PrefillChunk, request: Request) -> list[Found]:
        tokens = np.asarray(request.prompt[work.start : work.stop], np.int64)
        mix = request.mix_at(work.start)
        if isinstance(request.answer, Embedding):
            request.answer.read(self._engine.embed(work.row, tokens, work.start, mix))
            return []
        if request.generating.request.scoring.prompt_top is None:
            logits = self._engine.prefill(work.row, tokens, work.start, mix)
        else:
            logits = read_scored(
                self._engine, work.row, tokens, work.start, mix, request.generating
            )
        return [Found(logits[None])] if work.last else []

    def _decode(self, work: DecodeStep, requests: Sequence[Request]) -> Logits:
        answers = [request.generating for request in requests]
        return self._engine.decode(
            [
                RowStep(row, a.tokens[-1], a.position, request.mix_at(a.position))
                for row, request, a in zip(work.rows, requests, answers, strict=True)
            ]
        )

    def _alone(self, row: int, request: Request) -> Found:
        """The logits after the last token and after each of a draft's, where one is worth it.

        There is room for two tokens: the last token of a full context is never read."""
        answer = request.generating
        position, mix = answer.position, request.mix_at(answer.position)
        room = answer.request.stopping.max_tokens - len(answer.tokens) - 1
        draft = self._speculation.draft(answer, request.prompt, answer.tokens, room)
        began = time.perf_counter()
        # What fills up the step is overwritten by the token that comes.
        last = answer.tokens[-1]
        fill = (last,) * (self._speculation.least - 1 - len(draft))
        if draft or fill:
            tokens = np.array([last, *draft, *fill], np.int64)
            logits = self._engine.score(row, tokens, position, mix)
        else:
            logits = self._engine.decode([RowStep(row, last, position, mix)])
        self._speculation.computed(len(logits), time.perf_counter() - began)
        return Found(logits[: 1 + len(draft)], draft)
