"""What a step computes for its requests: chunks of prompts, tokens of answers, drafts to prove.

Knows what to ask of the engine and what its logits are for; takes no token and ends no request.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from remora_agent.engine.protocol import Engine, RowStep, Watch
from remora_agent.runtime.answer import Answer
from remora_agent.runtime.beside import Beside
from remora_agent.runtime.embedding import Embedding
from remora_agent.runtime.prompt_scoring import read_scored
from remora_agent.runtime.request import Request
from remora_agent.runtime.sampling import Logits
from remora_agent.runtime.shortlist import ShortRow
from remora_agent.runtime.speculation import Speculation
from remora_agent.runtime.work import PrefillChunk, Work

_NOTHING = Watch(np.zeros(0, np.int64))


@dataclass(frozen=True)
class Found:
    """What a step has computed for one request: logits of consecutive positions, the i-th of which
    counts when the token before it is the `draft`'s i-th."""

    logits: Sequence[Logits | ShortRow]  # 1 + len(draft), each [vocab]
    draft: tuple[int, ...] = ()


class Computing:
    def __init__(self, engine: Engine, speculation: Speculation, beside: Beside) -> None:
        self._engine = engine
        self._speculation = speculation
        self._beside = beside

    def run(self, work: Work, requests: Sequence[Request]) -> list[Found]:
        """The logits of each request that gets a token. Raises what the engine raises."""
        if isinstance(work, PrefillChunk):
            if work is self._beside.work:
                logits = self._beside.end()
                return [Found([logits])] if work.last else []
            return self._read(work, requests[0])
        if len(requests) == 1:
            return [self._alone(work.rows[0], requests[0])]
        return [Found([seen]) for seen in self._decode(work.rows, requests)]

    def _read(self, work: PrefillChunk, request: Request) -> list[Found]:
        text = request.text
        tokens = np.asarray(text[work.start : work.stop], np.int64)
        mix, whole = request.mix_at(work.start), len(text)
        if isinstance(request.answer, Embedding):
            request.answer.read(self._engine.embed(work.row, tokens, work.start, mix, whole))
            return []
        scoring = request.generating.request.scoring
        is_scored = scoring.prompt_top is not None and work.stop >= (scoring.prompt_from or 1)
        if work.again or not is_scored:
            logits = self._engine.prefill(work.row, tokens, work.start, mix, whole)
        else:
            logits = read_scored(
                self._engine, work.row, tokens, work.start, mix, request.generating
            )
        return [Found([logits])] if work.last else []

    def _decode(
        self, rows: Sequence[int], requests: Sequence[Request]
    ) -> Sequence[Logits | ShortRow]:
        """What each request's next token is drawn from."""
        answers = [request.generating for request in requests]
        steps = [
            RowStep(row, a.tokens[-1], a.position, request.mix_at(a.position))
            for row, request, a in zip(rows, requests, answers, strict=True)
        ]
        if self._engine.limits.shortlist:
            return self._shortlisted(steps, answers)
        return list(self._engine.decode(steps))

    def _shortlisted(
        self, steps: Sequence[RowStep], answers: Sequence[Answer]
    ) -> list[Logits | ShortRow]:
        """A row that must watch more than the engine can is read whole."""
        engine, limits = self._engine, self._engine.limits
        wanted = [a.watch(limits.watched) for a in answers]
        watches = [w if len(w.ids) <= limits.watched else _NOTHING for w in wanted]
        found = engine.decode_shortlist(steps, watches)
        return [
            ShortRow(found, i, want, limits.vocab, partial(engine.step_logits, i))
            if want is watched
            else engine.step_logits(i)
            for i, (want, watched) in enumerate(zip(wanted, watches, strict=True))
        ]

    def _alone(self, row: int, request: Request) -> Found:
        """The logits after the last token and after each of a draft's, where one is worth it.

        There is room for two tokens: the last token of a full context is never read."""
        answer = request.generating
        position, mix = answer.position, request.mix_at(answer.position)
        room = answer.request.stopping.max_tokens - len(answer.tokens) - 1
        switch = self._engine.limits.switch
        if switch is not None and position < switch:  # no step reads tokens of both kinds
            room = min(room, switch - position - 1)
        # Else nothing is learnt; and a draft would wait for the prompt that is read beside steps.
        is_measured = not request.job.is_spare and self._beside.work is None
        tried = room if is_measured else 0
        draft = self._speculation.draft(answer, request.prompt, answer.tokens, tried)
        began = time.perf_counter()
        # What fills up the step is overwritten by the token that comes.
        last = answer.tokens[-1]
        fill = (last,) * (self._speculation.least - 1 - len(draft))
        seen: Sequence[Logits | ShortRow]
        if draft or fill:
            tokens = np.array([last, *draft, *fill], np.int64)
            whole = position + 1 + len(draft)
            seen = list(self._engine.score(row, tokens, position, mix, whole))
        else:
            seen = self._decode([row], [request])
        if is_measured:
            self._speculation.computed(len(seen), time.perf_counter() - began)
        return Found(seen[: 1 + len(draft)], draft)
