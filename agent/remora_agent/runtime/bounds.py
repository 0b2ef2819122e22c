"""Which values the fields of a request may have, whatever the model. Pure, and light to import: the
client uses it too.
"""

from __future__ import annotations

from collections.abc import Sequence

from remora_agent.runtime.api import SamplingOverrides, SamplingParams, Scoring
from remora_contract.errors import RequestInvalid
from remora_contract.sampling_bounds import RANGES, Range

MAX_LOGIT_BIASES = 1024
MAX_LOGIT_BIAS = 100.0  # either way
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_LOGPROBS = 100_000  # values about the prompts of one call: about 1.3 MB of a message
MAX_CHOICES = 64  # answers to one request
_MAX_SEED = (1 << 64) - 1


def check_sampling(sampling: SamplingParams | SamplingOverrides, prefix: str = "") -> None:
    """Raises RequestInvalid naming the field behind `prefix`. None is unset."""
    for name, allowed in RANGES.items():
        value = getattr(sampling, name)
        if value is not None:
            allowed.check(prefix + name, value)
    if sampling.seed is not None and not 0 <= sampling.seed <= _MAX_SEED:
        raise RequestInvalid(f"{prefix}seed must be in 0..2^64-1, not {sampling.seed}")
    _check_biases(sampling.logit_bias, f"{prefix}logit_bias")


def _check_biases(biases: tuple[tuple[int, float], ...], where: str) -> None:
    """Whether the model has the tokens is not known here."""
    if len(biases) > MAX_LOGIT_BIASES:
        raise RequestInvalid(f"{where}: at most {MAX_LOGIT_BIASES} tokens, not {len(biases)}")
    if len({token for token, _ in biases}) < len(biases):
        raise RequestInvalid(f"{where} names a token twice")
    allowed = Range(-MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    for token, value in biases:
        allowed.check(f"{where} of token {token}", value)


def check_scoring(scoring: Scoring) -> None:
    """Raises RequestInvalid."""
    for name, top in (("logprobs", scoring.top), ("prompt_logprobs", scoring.prompt_top)):
        if top is not None:
            Range(0, MAX_TOP_LOGPROBS, "that many of the likeliest too").check(name, top)


def check_prompt_scores(top: int | None, prompt_tokens: Sequence[int]) -> None:
    """`prompt_tokens` of each answer to one call, whose reader may be slow: all are kept until he
    has read them. Raises RequestInvalid."""
    if top is None:
        return
    tokens = sum(prompt_tokens)
    values = tokens * (top + 1)
    if values > MAX_PROMPT_LOGPROBS:
        each = f" of {len(prompt_tokens)} answers" if len(prompt_tokens) > 1 else ""
        raise RequestInvalid(
            f"prompt_logprobs: {top} of the likeliest at each of the {tokens} prompt tokens{each} "
            f"are {values} values and {MAX_PROMPT_LOGPROBS} the most; ask for fewer or send a "
            "shorter prompt"
        )


def check_choices(n: int) -> None:
    """Raises RequestInvalid."""
    Range(1, MAX_CHOICES, "answers").check("n", n)
