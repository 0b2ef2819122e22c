"""Asks an engine a release's golden questions (remora_contract.gates) before it serves.

Greedy answers, teacher-forced logits, and the likelihood of a text compared with what the incumbent
makes of it. Knows no process and no tokenizer file: text <-> token ids come in. What an engine
cannot be asked is Unsupported, naming the question; a wrong answer is an EngineFault with both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Engine, Mix, RowStep
from remora_contract.errors import EngineFault, Unsupported
from remora_contract.gates import GoldenQuestion

_SPARE_TOKENS = 16  # that an answer may be longer than what is expected, before it counts as other
_SHOWN = 80


@dataclass(frozen=True)
class Asked:
    """One side of a comparison: an engine with what its release's names mean."""

    engine: Engine
    encode: Callable[[str], tuple[int, ...]]
    decode: Callable[[Sequence[int]], str]
    eos: frozenset[int]
    mix_of: Callable[[str | None], Mix]  # of a use case or adapter; None: the base model


def ask(side: Asked, question: GoldenQuestion) -> None:
    """Raises EngineFault for another answer than expected, Unsupported for what cannot be asked."""
    tokens = question_tokens(side, question)
    mix = side.mix_of(question.use_case)
    if question.kind == "logits":
        _compare_logits(side.engine, question, tokens, mix)
    elif question.expected_tokens:
        _compare_tokens(side, question, tokens, mix)
    elif question.expected_text is not None:
        _compare_text(side, question, tokens, mix)


def question_tokens(side: Asked, question: GoldenQuestion) -> NDArray[np.int64]:
    """Token ids [s] of what is asked. Raises Unsupported when question and answer do not fit."""
    ids = question.tokens if question.text is None else side.encode(question.text)
    limits = side.engine.limits
    answer = len(question.expected_tokens) if question.kind != "logits" else 0
    if not ids or len(ids) + answer > limits.context:
        raise Unsupported(
            f"golden question {question.name} has {len(ids)} tokens and {answer} of an answer; "
            f"this device's engine holds 1 to {limits.context}"
        )
    unknown = [t for t in (*ids, *question.expected_tokens) if t >= limits.vocab]
    if unknown:
        raise Unsupported(f"golden question {question.name}: the model has no token {unknown[0]}")
    return np.array(ids, np.int64)


def _greedy(
    engine: Engine, tokens: NDArray[np.int64], mix: Mix, most: int, done: Callable[[int], bool]
) -> list[int]:
    """At most `most` tokens, as a request gets them; `done(token)` ends the answer, with that token
    as its last."""
    answer: list[int] = []
    logits = engine.prefill(0, tokens, 0, mix)
    while len(answer) < most:
        token = int(logits.argmax())
        answer.append(token)
        position = len(tokens) + len(answer) - 1
        if done(token) or position >= engine.limits.context:
            break
        if position == engine.limits.switch:
            logits = engine.prefill(0, np.array([*tokens, *answer], np.int64), 0, mix)
        else:
            logits = engine.decode([RowStep(0, token, position, mix)])[0]
    return answer


def _compare_tokens(
    side: Asked, question: GoldenQuestion, tokens: NDArray[np.int64], mix: Mix
) -> None:
    wanted = list(question.expected_tokens)
    got = _greedy(side.engine, tokens, mix, len(wanted), lambda token: False)
    if got != wanted:
        at = next(i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b)
        raise EngineFault(
            f"golden question {question.name}: token {at} of the answer is {got[at]}, "
            f"not {wanted[at]}"
        )


def _compare_text(
    side: Asked, question: GoldenQuestion, tokens: NDArray[np.int64], mix: Mix
) -> None:
    wanted = question.expected_text or ""
    most = len(side.encode(wanted)) + _SPARE_TOKENS
    got = _greedy(side.engine, tokens, mix, most, lambda token: token in side.eos)
    text = side.decode([t for t in got if t not in side.eos])
    is_right = text == wanted if question.kind == "exact" else text.startswith(wanted)
    if not is_right:
        need = "" if question.kind == "exact" else "something that begins with "
        raise EngineFault(
            f"golden question {question.name}: the answer is {text[:_SHOWN]!r}, not "
            f"{need}{wanted[:_SHOWN]!r}"
        )


def _compare_logits(
    engine: Engine, question: GoldenQuestion, tokens: NDArray[np.int64], mix: Mix
) -> None:
    first = len(tokens) - len(question.expected_tokens)
    whole = len(tokens)  # the recording is of one pass over all of them
    logits = engine.prefill(0, tokens[: first + 1], 0, mix, whole)
    for i, (wanted, recorded) in enumerate(
        zip(question.expected_tokens, question.logits, strict=True)
    ):
        if i:
            step = RowStep(0, int(tokens[first + i]), first + i, mix, whole)
            logits = engine.decode([step])[0]
        _check_logit(question, first + i, wanted, recorded, logits)


def _check_logit(
    question: GoldenQuestion,
    position: int,
    wanted: int,
    recorded: float,
    logits: NDArray[np.float32],
) -> None:
    where = f"golden question {question.name}, position {position}"
    if not np.isfinite(logits).all():
        raise EngineFault(f"{where}: the logits are not finite")
    allowed = question.tolerance * float(logits.std())
    best = int(logits.argmax())
    if logits[best] - logits[wanted] > 2 * allowed:
        raise EngineFault(
            f"{where}: the answer is token {best}, not {wanted}, by "
            f"{logits[best] - logits[wanted]:.4g}; {2 * allowed:.4g} is tolerated"
        )
    if abs(float(logits[wanted]) - recorded) > allowed:
        raise EngineFault(
            f"{where}: token {wanted} has logit {logits[wanted]:.5g}, recorded {recorded:.5g}, "
            f"further apart than {allowed:.4g}"
        )


def surprise(side: Asked, question: GoldenQuestion) -> float:
    """Nats per byte of the question's text, or per token of its tokens.

    With p the model's distribution: -sum_i ln p(t[i+1] | t[..i]) over what that stands for.
    """
    tokens = question_tokens(side, question)
    if len(tokens) < 2:
        raise Unsupported(f"golden question {question.name} is one token: nothing to score")
    total = _nats(side.engine, tokens, side.mix_of(question.use_case))
    units = len(tokens) - 1 if question.text is None else len(question.text.encode())
    return total / units


def _nats(engine: Engine, tokens: NDArray[np.int64], mix: Mix) -> float:
    """-sum of log p of tokens[1:], each after all before it."""
    total, most, whole = 0.0, engine.limits.scored, len(tokens)
    if most:
        for at in range(0, len(tokens) - 1, most):
            piece = tokens[at : min(at + most, len(tokens) - 1)]
            logits = engine.score(0, piece, at, mix, whole)
            total += sum(_nat(row, int(tokens[at + i + 1])) for i, row in enumerate(logits))
        return total
    row = engine.prefill(0, tokens[:1], 0, mix, whole)
    for i in range(1, len(tokens)):
        total += _nat(row, int(tokens[i]))
        if i + 1 < len(tokens):
            row = engine.decode([RowStep(0, int(tokens[i]), i, mix, whole)])[0]
    return total


def _nat(logits: NDArray[np.float32], token: int) -> float:
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(np.log(np.exp(shifted).sum()) - shifted[token])


def compare_surprise(question: GoldenQuestion, new: float, old: float) -> None:
    """`new` and `old` are nats per byte or token. Raises EngineFault when the perplexity rose by
    more than the question allows, or is no number."""
    if not (math.isfinite(new) and math.isfinite(old)):
        raise EngineFault(f"golden question {question.name}: the likelihood is not finite")
    increase = math.expm1(min(new - old, 700.0))
    if increase > question.max_increase:
        raise EngineFault(
            f"golden question {question.name}: perplexity is {increase:.1%} above that of the "
            f"release which serves ({math.exp(min(new, 700.0)):.4g} against "
            f"{math.exp(min(old, 700.0)):.4g}); {question.max_increase:.1%} is allowed"
        )


def mixes_of(
    handles: Mapping[str, int],
    use_cases: Mapping[str, Sequence[tuple[str, float]]],
    mix: Callable[[int, float], Mix],
) -> Callable[[str | None], Mix]:
    """Names of a release -> mixes; a name that it has not is the base model alone."""

    def mix_of(name: str | None) -> Mix:
        if name is None:
            return ()
        parts = use_cases.get(name, ((name, 1.0),))
        known = [(handles[adapter], w) for adapter, w in parts if adapter in handles]
        return tuple(entry for handle, w in known for entry in mix(handle, w))

    return mix_of
