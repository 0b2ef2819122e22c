"""Whether a call asks an engine for rows, positions and tokens that there are, and how it is cut.
Pure.

Every backend asks before it computes, so all of them refuse the same calls in the same words.
`lengths` [rows] says how many tokens each row holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import EngineLimits, KvBlock, Mix, RowStep
from remora_contract.bundle import Bundle
from remora_contract.errors import Incompatible, PromptTooLong, Refusal, RequestInvalid

Lengths = NDArray[np.int64]
_SCORED_BYTES = 32 << 20  # logits of one `Engine.score`, in host memory
_MOST_SCORED = 512
_LEAST_CONTEXT = 2  # a token of the prompt and one of the answer


def context_of(asked: int | None, most: int) -> int:
    """Tokens a row holds; `most`: what the bundle was exported for. Raises RequestInvalid."""
    if asked is None:
        return most
    if asked < _LEAST_CONTEXT:
        raise RequestInvalid(f"a context holds {_LEAST_CONTEXT} to {most} tokens, not {asked}")
    if asked > most:
        raise RequestInvalid(
            f"a context of {asked} is more than {most}, what the bundle was exported for; export "
            "it with a larger --max-context"
        )
    return asked


def switch_of(bundle: Bundle, context: int) -> int | None:
    """`EngineLimits.switch`. Raises Incompatible for a graph that would choose by the end of each
    call: of a long prompt read in chunks it would turn the first ones otherwise than the rest."""
    switch = bundle.decoder.switches(context)
    if switch is not None and not bundle.graph.sequence_length:
        need = f"exported again by this version of remora-build, or a context of at most {switch}"
        raise Incompatible([Refusal("longrope", need, f"a context of {context} and no length")])
    return switch


@dataclass(frozen=True)
class Part:
    """Tokens [s] of one row from `start` on, of a sequence of `whole`."""

    row: int
    tokens: NDArray[np.int64]
    start: int
    mix: Mix
    whole: int

    @classmethod
    def of(
        cls, row: int, tokens: NDArray[np.int64], start: int, mix: Mix, length: int | None
    ) -> Part:
        """As `Engine.prefill` is asked: without `length` they end their sequence."""
        return cls(row, tokens, start, mix, start + len(tokens) if length is None else length)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        return self.start + len(self)

    def cut(self, begin: int, size: int) -> Part:
        """At most `size` of its tokens, without the first `begin`."""
        tokens = self.tokens[begin : begin + size]
        return Part(self.row, tokens, self.start + begin, self.mix, self.whole)


def most_scored(vocab: int) -> int:
    """Tokens of one `Engine.score`."""
    return max(1, min(_MOST_SCORED, _SCORED_BYTES // (4 * vocab)))


def check_scored(limits: EngineLimits, tokens: NDArray[np.int64]) -> None:
    """Raises RequestInvalid."""
    if len(tokens) > limits.scored:
        raise RequestInvalid(f"{len(tokens)} tokens are more than the {limits.scored} of one score")


def check_chunk(
    limits: EngineLimits, lengths: Lengths, row: int, tokens: NDArray[np.int64], start: int
) -> None:
    """Tokens [s] for `row` from `start` on. Raises RequestInvalid, PromptTooLong."""
    _check_place(limits, lengths, row, start)
    if tokens.ndim != 1 or not len(tokens):
        raise RequestInvalid("give at least one token in one row")
    _check_context(start + len(tokens), limits.context)
    check_tokens(limits, tokens)


def check_steps(limits: EngineLimits, lengths: Lengths, steps: Sequence[RowStep]) -> None:
    """At least one step. Raises RequestInvalid, PromptTooLong."""
    if len({step.row for step in steps}) != len(steps):
        raise RequestInvalid("a row is named twice in one decode")
    for step in steps:
        _check_place(limits, lengths, step.row, step.position)
        if step.position >= limits.context:
            raise PromptTooLong(f"position {step.position} is past the context of {limits.context}")
    check_tokens(limits, np.array([step.token for step in steps]))


def check_read(limits: EngineLimits, lengths: Lengths, row: int, start: int, stop: int) -> None:
    """Raises RequestInvalid for what the row does not hold."""
    _check_row(limits, row)
    if not 0 <= start < stop <= int(lengths[row]):
        raise RequestInvalid(f"row {row} holds {lengths[row]} tokens, not {start} to {stop}")


def check_write(
    limits: EngineLimits, lengths: Lengths, row: int, start: int, block: KvBlock
) -> None:
    """Raises RequestInvalid, PromptTooLong."""
    _check_place(limits, lengths, row, start)
    _check_context(start + block.tokens, limits.context)


def _check_row(limits: EngineLimits, row: int) -> None:
    if not 0 <= row < limits.rows:
        raise RequestInvalid(f"row {row} is outside 0..{limits.rows - 1}")


def _check_place(limits: EngineLimits, lengths: Lengths, row: int, position: int) -> None:
    _check_row(limits, row)
    held = int(lengths[row])
    if not 0 <= position <= held:
        raise RequestInvalid(f"row {row} holds {held} tokens; position {position} leaves a gap")


def _check_context(tokens: int, context: int) -> None:
    if tokens > context:
        raise PromptTooLong(f"{tokens} tokens are more than the context of {context}")


def check_tokens(limits: EngineLimits, tokens: NDArray[np.int64]) -> None:
    if tokens.min() < 0 or tokens.max() >= limits.vocab:
        raise RequestInvalid(f"token ids must be in 0..{limits.vocab - 1}")
