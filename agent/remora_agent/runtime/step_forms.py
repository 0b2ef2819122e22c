"""Does an engine answer alike, bit for bit, however several tokens of a row are cut into steps?

A runtime multiplies one row by other kernels than several, and sums in another order. Rounding of
activations makes of the last bit of a float as much as rounding costs in all, and keys and values
keep it: a token once read in another form moves every later one. Only forms that are equal bit for
bit give the same answers, and steps of two tokens and more can be where one token alone differs.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Engine

LEAST = 2  # tokens of a step that is of the several-token form
_TRIED = (2, 3, 5)  # tokens a step, held against all in one
_STRIDE = 7919  # spreads the tokens over the vocabulary


def forms_agree(engine: Engine, most: int) -> bool:
    """Whether steps of 2 to `most` + 1 tokens give the same logits. Overwrites row 0 from its
    start, before any request; raises what the engine raises."""
    limits = engine.limits
    count = min(most + 1, limits.scored, limits.context)
    if count < LEAST:
        return True
    tokens = np.arange(1, count + 1, dtype=np.int64) * _STRIDE % limits.vocab
    whole = engine.score(0, tokens, 0)  # of one sequence, as its pieces are
    return all(np.array_equal(whole, _cut(engine, tokens, size)) for size in _TRIED if size < count)


def _cut(engine: Engine, tokens: NDArray[np.int64], size: int) -> NDArray[np.float32]:
    """Logits [s, vocab] read in steps of `size`; the last begins earlier, so as not to be short."""
    found = np.empty((len(tokens), engine.limits.vocab), np.float32)
    for at in range(0, len(tokens), size):
        begin = min(at, len(tokens) - size)
        found[begin : begin + size] = engine.score(
            0, tokens[begin : begin + size], begin, length=len(tokens)
        )
    return found
