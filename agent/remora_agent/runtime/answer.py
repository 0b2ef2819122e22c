"""One request from acceptance to its last event: logits to token, token to text, text to events.

Owns the request's sampler, detokeniser and stop strings, and the times of its milestones. `take` is
the one way to a token, one position at a time, so that whatever proposed the token it is drawn,
counted and constrained alike. Knows nothing of other requests, queues, engines or adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Watch
from remora_agent.runtime import shortlist
from remora_agent.runtime.api import (
    Accepted,
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    OnEvent,
    PromptScored,
    Provenance,
    Timings,
    TokenLogprob,
    Usage,
)
from remora_agent.runtime.constraint import Matcher
from remora_agent.runtime.logprobs import scored
from remora_agent.runtime.sampling import Allowed, Logits, Sampler
from remora_agent.runtime.shortlist import ShortRow
from remora_agent.runtime.stopping import StopStrings, ending_tokens, stop_reason
from remora_agent.text.detokenize import Detokenizer
from remora_contract.errors import RemoraError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenTaken:
    """What one step did for the answer."""

    reason: FinishReason | None  # set: the answer is complete
    since_last_s: float  # since the token before; for the first, since submission
    first: bool


class Answer:
    def __init__(
        self,
        request: GenerationRequest,
        provenance: Provenance,
        sampler: Sampler,
        detokenizer: Detokenizer,
        eos: Collection[int],
        on_event: OnEvent,
        now: float,
        matcher: Matcher | None = None,
    ) -> None:
        """`request.stopping.max_tokens` fits the context already. `matcher` is the request's
        constraint at its start."""
        self.request = request
        self.provenance = provenance
        self.tokens: list[int] = []
        self.cached_tokens = 0  # of the prompt, not computed
        self._sampler = sampler
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._stops = StopStrings(request.stopping.stop)
        self._stop_match = ""
        self._ending = ending_tokens(request.stopping, eos)
        self._on_event = on_event
        self._unsent: list[int] = []  # tokens whose text is held back
        self._unsent_logprobs: list[TokenLogprob] = []  # one for each, when asked for
        self._submitted_s = now
        self._prompt_logprobs: list[TokenLogprob] = []
        self._admitted_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s = now

    @property
    def position(self) -> int:
        """Where the last token is to be written in the cache."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def deaf(self) -> bool:
        """Nobody listens any more."""
        return self._on_event is _nobody

    def accept(self) -> None:
        self._emit(Accepted(self.request.request_id, self.provenance))

    def admitted(self, now: float) -> None:
        self._admitted_s = now

    def score_prompt(self, start: int, logits: Logits) -> None:
        """logits [s, vocab] after the prompt's tokens from `start` on: each scores the next one."""
        prompt, scoring = self.request.prompt, self.request.scoring
        self._prompt_logprobs.extend(
            scored(after, prompt[position], scoring.prompt_top or 0)
            for position, after in enumerate(logits, start + 1)
            if (scoring.prompt_from or 1) <= position < len(prompt)
        )

    def watch(self, room: int) -> Watch:
        """What the next token's draw needs beside the largest logits; more than there is `room` for
        only where all of it is needed."""
        return self._sampler.watch(room)

    def take(self, seen: Logits | ShortRow, now: float) -> TokenTaken:
        """Draws the next token from logits [vocab], which stay as they are, or from a row's
        shortlist where that says which it is. Raises EngineFault for logits that are not numbers,
        RequestInvalid when no token may follow."""
        if self.request.scoring.prompt_top is not None and not self.tokens:
            self._emit(PromptScored(tuple(self._prompt_logprobs)))
        vocab = seen.vocab if isinstance(seen, ShortRow) else len(seen)
        allowed = None if self._matcher is None else self._matcher.allowed(vocab)
        token = self._draw(seen, allowed, self._banned(vocab))
        self.tokens.append(token)
        self._unsent.append(token)
        if self.request.scoring.top is not None:
            self._unsent_logprobs.append(_scored(seen, token, self.request.scoring.top))
        taken = TokenTaken(
            self._advance(token), now - self._last_token_s, self._first_token_s is None
        )
        self._first_token_s = now if taken.first else self._first_token_s
        self._last_token_s = now
        return taken

    def finish(self, reason: FinishReason, now: float) -> None:
        """The last event. What was held back, for a stop string or the rest of a character, goes
        out first, so that the text is the decoding of its tokens."""
        if not self._stop_match:
            rest = self._stops.push(self._detokenizer.flush())
            self._send(rest.text + self._stops.flush(), complete=True)
            if rest.match is not None:
                self._stop_match, reason = rest.match, FinishReason.STOP
        usage = Usage(len(self.request.prompt), self.cached_tokens, len(self.tokens))
        timings = self._timings(now)
        self._emit(Finished(reason, usage, timings, self.provenance, self._stop_match))

    def fail(self, error: RemoraError) -> None:
        """The last event instead."""
        self._emit(Failed(error))

    def _draw(
        self,
        seen: Logits | ShortRow,
        allowed: Allowed | None,
        banned: NDArray[np.int64] | None,
    ) -> int:
        if not isinstance(seen, ShortRow):
            return self._sampler.draw(seen, allowed, banned)
        token = self._sampler.pick(seen, allowed, banned)
        return self._sampler.draw(seen.all, allowed, banned) if token is None else token

    def _banned(self, vocab: int) -> NDArray[np.int64] | None:
        """Tokens that would end the answer before `min_tokens`."""
        if len(self.tokens) >= self.request.stopping.min_tokens:
            return None
        return np.fromiter((i for i in self._ending if 0 <= i < vocab), np.int64)

    def _advance(self, token: int) -> FinishReason | None:
        stopping = self.request.stopping
        reason = stop_reason(token, len(self.tokens), stopping.max_tokens, self._ending)
        if reason is FinishReason.STOP:
            return reason  # a stop token has no text
        text = self._detokenizer.push(token)
        early = len(self.tokens) <= stopping.min_tokens
        passed = self._stops.skip(text) if early else self._stops.push(text)
        if passed.match is not None:
            self._stop_match = passed.match
            self._send(passed.text, complete=True)
            return FinishReason.STOP
        self._send(passed.text, complete=not (self._stops.holds or self._detokenizer.holds))
        return FinishReason.STOP if self._satisfied(token) else reason

    def _satisfied(self, token: int) -> bool:
        """Whether the constraint lets nothing follow `token`."""
        if self._matcher is None:
            return False
        self._matcher.advance(token)
        return self._matcher.finished

    def _send(self, text: str, *, complete: bool) -> None:
        """With no text the tokens go out only when none of theirs is held back."""
        if text or (complete and self._unsent):
            self._emit(Delta(text, tuple(self._unsent), tuple(self._unsent_logprobs)))
            self._unsent.clear()
            self._unsent_logprobs.clear()

    def _emit(self, event: Event) -> None:
        try:
            self._on_event(event)
        except RuntimeError as e:
            # What a closed asyncio loop raises: the listener is gone, the others are not.
            log.warning(
                "listener.gone", extra={"request_id": self.request.request_id, "error": str(e)}
            )
            self._on_event = _nobody

    def _timings(self, now: float) -> Timings:
        admitted = now if self._admitted_s is None else self._admitted_s
        first = now if self._first_token_s is None else self._first_token_s
        return Timings(
            queue_s=admitted - self._submitted_s,
            prefill_s=first - admitted,
            decode_s=now - first,
            time_to_first_token_s=first - self._submitted_s if self._first_token_s else 0.0,
        )


def _scored(seen: Logits | ShortRow, token: int, top: int) -> TokenLogprob:
    if not isinstance(seen, ShortRow):
        return scored(seen, token, top)
    return shortlist.scored(seen, token, top) or scored(seen.all, token, top)


def _nobody(event: Event) -> None:
    """Stands in for a listener that is gone."""
