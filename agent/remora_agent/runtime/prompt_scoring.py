"""Reads a piece of a prompt whose tokens' logprobs are wanted. Knows the engine's way to give the
logits of every position, and hands them to the answer at once: a whole prompt's are never held.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Engine, Mix
from remora_agent.runtime.answer import Answer
from remora_agent.runtime.penalties import Logits


def read_scored(
    engine: Engine, row: int, tokens: NDArray[np.int64], start: int, mix: Mix, answer: Answer
) -> Logits:
    """As `engine.prefill` of tokens [s] of the answer's prompt: the logits [vocab] after the last
    one."""
    whole = len(answer.request.prompt)
    most = engine.limits.scored
    for at in range(0, len(tokens), most):
        logits = engine.score(row, tokens[at : at + most], start + at, mix, whole)
        answer.score_prompt(start + at, logits)
    last: Logits = logits[-1]
    return last
