"""The build's trial of int8 prompts: made, held against the plain form on the golden prompts, kept
or removed. In the build's child process.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.agreement import Agreement, compare, objections
from remora_agent.engine.ort.engine import EngineFiles, OrtEngine, PrefillForm
from remora_agent.engine.protocol import EngineLimits, RowStep
from remora_contract.bundle import Bundle
from remora_contract.golden import Golden

log = logging.getLogger(__name__)

_LONG = 256  # tokens of all golden prompts, one after the other, read as one
_LONG_CHECKED = 16
_MOST_POSITIONS = 256  # logits of so many are held at once

Sequences = Sequence[tuple[NDArray[np.int64], int]]


def trial(files: EngineFiles, prefill: str, bundle: Bundle, golden: Golden) -> Agreement:
    """Answers the same tokens through both forms. Raises EngineFault."""
    checked = sequences(golden, bundle.graph.context)
    decoder, graph = bundle.decoder, bundle.graph
    limits = EngineLimits(
        1, graph.context, decoder.vocab, graph.max_bank_rank, hidden=decoder.hidden
    )
    forms = []
    for file in (None, prefill):
        form = None if file is None else PrefillForm(file, least=1)
        engine = OrtEngine(replace(files, prefill=form), decoder, limits, None, graph)
        forms.append(_logits(engine, checked))
        engine.close()
    found = compare(*forms)
    log.info("engine.prefill_compared", extra={"found": found.summary()})
    return found


def sequences(golden: Golden, context: int) -> Sequences:
    """(tokens, how many of the last positions count): every golden prompt that fits, and all of
    them as one long prompt, because one scale then serves a whole chunk."""
    fitting = [p for p in golden.prompts if len(p.tokens) <= context]
    found = [(np.array(p.tokens, np.int64), len(p.expected)) for p in fitting if p.expected]
    if found:
        joined = np.concatenate([tokens for tokens, _ in found])
        long = np.resize(joined, min(_LONG, context))
        found.append((long, min(_LONG_CHECKED, len(long))))
    kept, total = [], 0
    for tokens, count in reversed(found):
        if total + count <= _MOST_POSITIONS:
            kept.append((tokens, count))
            total += count
    return kept[::-1]


def allowed(found: Agreement) -> tuple[bool, str]:
    """Whether int8 prompts may serve by themselves, and the outcome in words."""
    wrong = objections(found)
    return not wrong, "; ".join([found.summary(), *wrong])


def _logits(engine: OrtEngine, checked: Sequences) -> NDArray[np.float32]:
    """[positions, vocab], teacher-forced: the last `count` positions of each sequence."""
    rows = []
    for tokens, count in checked:
        first = len(tokens) - count
        whole = len(tokens)
        rows.append(engine.prefill(0, tokens[: first + 1], 0, length=whole))
        rows += [
            engine.decode([RowStep(0, int(tokens[at]), at, length=whole)])[0]
            for at in range(first + 1, len(tokens))
        ]
    return np.array(rows, np.float32).reshape(len(rows), -1)
