"""When an answer ends: stop strings across token borders, stop tokens, length. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from remora_agent.runtime.api import FinishReason, StoppingParams


@dataclass(frozen=True)
class Passed:
    """Text that may go out, and the stop string that ended it, if one did."""

    text: str
    match: str | None = None


class StopStrings:
    """Lets text through up to the first stop string.

    The first is the one that is complete first; of several complete at once, the longest. So the
    result does not depend on how the text is cut into pieces. Text that may be the beginning of a
    stop string is held back until the next piece decides.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def push(self, text: str) -> Passed:
        """After a match nothing more may be pushed."""
        text = self._held + text
        self._held = ""
        if match := self._first_match(text):
            return Passed(text[: text.index(match)], match)
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return Passed(text[: len(text) - keep])

    def skip(self, text: str) -> Passed:
        """Lets text through in which no stop string counts, nor one that begins in it."""
        return Passed(self.flush() + text)

    def flush(self) -> str:
        """What was held back, when the answer ends otherwise."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> str | None:
        ends = [
            (text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text
        ]
        return min(ends)[2] if ends else None


def stop_reason(
    token: int, produced: int, max_tokens: int, ending: Collection[int]
) -> FinishReason | None:
    """Whether the answer ends with `token`, its `produced`-th. A stop wins over the length."""
    if token in ending:
        return FinishReason.STOP
    return FinishReason.LENGTH if produced >= max_tokens else None


def ending_tokens(params: StoppingParams, eos: Collection[int]) -> frozenset[int]:
    """Tokens with which the answer ends."""
    return frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
