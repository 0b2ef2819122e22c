"""Prompt-lookup speculative decoding: guess the next tokens from what was read and said before, and
prove them all in one step.

What follows the longest earlier match of the text's end is the guess. The engine reads it after the
last token in one call; the answer then draws position by position and keeps the draws as long as
they equal the guess, so that no draw is ever another than without. Whether a guess is worth a step:

    tokens a step   E(k) = 1 + a + a^2 + ... + a^k      a: share of guessed tokens that came true
    tokens a second E(k) / T(k + 1)                     T(m): seconds of a step that reads m tokens

Both are measured. Guesses are made, and held against what comes, also while none is proven: that
costs nothing, so a request whose text repeats itself later is noticed. Pure but for its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from remora_agent.runtime.options import MAX_DRAFT_TOKENS, RuntimeOptions
from remora_agent.runtime.step_forms import LEAST

Tokens = NDArray[np.int32]

# Drafts have one of these lengths, so that their costs are soon known.
LENGTHS = (1, 2, 4, 8, 12, MAX_DRAFT_TOKENS)
_SHORTEST, _LONGEST = 2, 6  # tokens of a match
_FIRST_RATES = (0.4, 0.5, 0.6, 0.7, 0.8)  # of matches of 2, 3, …: believed before any is seen
_RATE_WEIGHT = 1 / 8  # of one token's outcome
_COST_WEIGHT = 1 / 4  # of one step's time
_MOST_JUMP = 2.0  # a step that took longer than so many times the usual counts as that
_UNTRIED = 0.1  # of a plain step that each further token is believed to cost at first
_EASING = 0.995  # what drafts cost more is believed a little less with each step without one
_WORTH = 1.02  # by so much a draft must promise to be faster


@dataclass(frozen=True)
class Guess:
    """`tokens` may come next; the last `match` tokens of the text were seen before them."""

    tokens: tuple[int, ...]
    match: int


def lookup(text: Tokens, most: int) -> Guess | None:
    """What followed the latest of the longest earlier matches of the end of `text` [n]; None
    without a match of two tokens. A match that reaches to the end goes on with the guess itself,
    as text does that repeats."""
    n = len(text)
    if n <= _SHORTEST or most < 1:
        return None
    ends = np.flatnonzero(text[_SHORTEST - 1 : -1] == text[-1]) + _SHORTEST - 1
    ends = ends[text[ends - 1] == text[-2]]
    if not len(ends):
        return None
    match = _SHORTEST
    while match < _LONGEST:
        longer = ends[ends >= match]
        longer = longer[text[longer - match] == text[n - 1 - match]]
        if not len(longer):
            break
        ends, match = longer, match + 1
    after = int(ends[-1]) + 1
    period = n - after
    return Guess(tuple(int(text[after + i % period]) for i in range(most)), match)


def best_length(rate: float, seconds: Callable[[int], float], most: int) -> int:
    """How many tokens to draft, at most `most`; 0 when a plain step is faster."""
    best, best_speed = 0, _WORTH / seconds(1)
    for length in LENGTHS:
        if length > most:
            break
        expected = sum(rate**i for i in range(length + 1))
        speed = expected / seconds(length + 1)
        if speed > best_speed:
            best, best_speed = length, speed
    return best


class StepCosts:
    """Seconds of steps by how many tokens of one row they read, `least` at least."""

    def __init__(self, least: int = 1) -> None:
        self._least = least
        self._seconds: dict[int, float] = {}
        self._belief = 1.0  # in what longer steps cost more; full again when one is measured

    @property
    def known(self) -> bool:
        """Is there anything to compare with?"""
        return self._least in self._seconds

    def record(self, tokens: int, seconds: float) -> None:
        if tokens > self._least:
            self._belief = 1.0
        usual = self._seconds.get(tokens)
        if usual is None:
            self._seconds[tokens] = seconds
        else:
            seconds = min(seconds, _MOST_JUMP * usual)
            self._seconds[tokens] = usual + _COST_WEIGHT * (seconds - usual)

    def of(self, tokens: int) -> float:
        """Measured, or on the line through what was; only when `known`."""
        plain = self._seconds[self._least]
        tokens = max(tokens, self._least)
        return plain + self._belief * max(0.0, self._measured(tokens, plain) - plain)

    def ease(self) -> None:
        """Costs may have been measured in a bad moment: they are doubted until they are measured
        again, and are so once in a long while."""
        self._belief *= _EASING

    def _measured(self, tokens: int, plain: float) -> float:
        found = self._seconds.get(tokens)
        if found is not None:
            return found
        tried = sorted(m for m in self._seconds if m > self._least)
        near = next((m for m in tried if m > tokens), tried[-1] if tried else None)
        if near is None:
            return plain * (1 + _UNTRIED * (tokens - self._least))
        each = (self._seconds[near] - plain) / (near - self._least)
        return plain + each * (tokens - self._least)


class Drafter:
    """One request's text, its guess, and how its guesses have fared by length of match."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self._text: Tokens = np.array(prompt, np.int32)
        self._held = len(self._text)
        self._prompt = len(self._text)
        self._guess: Guess | None = None
        self._rates = list(_FIRST_RATES)

    def guess(self, answer: Sequence[int], most: int) -> Guess | None:
        """What may follow prompt and `answer`, which has grown since the last call."""
        self._hear(answer[self._held - self._prompt :])
        self._guess = lookup(self._text[: self._held], most)
        return self._guess

    def rate(self, guess: Guess) -> float:
        """Share of such guesses' tokens that came true, of those whose predecessors did."""
        return self._rates[guess.match - _SHORTEST]

    def _hear(self, said: Sequence[int]) -> None:
        if self._guess is not None:
            at = self._guess.match - _SHORTEST
            for token, guessed in zip(said, self._guess.tokens, strict=False):
                self._rates[at] += _RATE_WEIGHT * ((token == guessed) - self._rates[at])
                if token != guessed:
                    break
        end = self._held + len(said)
        if end > len(self._text):
            grown = np.empty(max(end, 2 * len(self._text)), np.int32)
            grown[: self._held] = self._text[: self._held]
            self._text = grown
        self._text[self._held : end] = said
        self._held = end


class Speculation:
    """Of one runtime: what steps cost, and a drafter for each request that decodes alone. Belongs
    to the step thread."""

    def __init__(self, most: int, least: int = 1) -> None:
        """`most` tokens in one draft; 0: none at all. A step reads `least` tokens, drafts or not:
        one, or two where all steps are to be of one form (runtime.step_forms)."""
        self._most = most
        self.least = least
        self._costs = StepCosts(least)
        self._drafters: WeakKeyDictionary[object, Drafter] = WeakKeyDictionary()

    def draft(
        self, request: object, prompt: Sequence[int], answer: Sequence[int], room: int
    ) -> tuple[int, ...]:
        """Tokens to prove after the last of `answer`, at most `room`; none where a plain step is
        faster. `request` is who asks, for as long as it lives."""
        if self._most < 1:
            return ()
        drafter = self._drafters.get(request)
        if drafter is None:
            drafter = self._drafters[request] = Drafter(prompt)
        guess = drafter.guess(answer, self._most)
        if guess is None or not self._costs.known:
            return ()
        length = best_length(drafter.rate(guess), self._costs.of, min(room, self._most))
        if not length and room > 0:
            self._costs.ease()
        return guess.tokens[:length]

    def give_up(self) -> None:
        """Nothing is drafted from now on, and a step reads one token."""
        self._most, self.least = 0, 1

    def computed(self, tokens: int, seconds: float) -> None:
        """A step of one row has read so many tokens in so many seconds."""
        self._costs.record(tokens, seconds)


def speculation_of(options: RuntimeOptions, scored: int) -> Speculation:
    """With an engine that reads `scored` tokens in one step that gives the logits of each. Exact:
    every step reads tokens enough to be of the several-token form."""
    least = LEAST if options.exact_drafts and scored >= LEAST else 1
    return Speculation(min(options.draft_tokens, scored - 1), least)
