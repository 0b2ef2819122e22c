"""The fields that chat and plain completions share, OpenAI's and those of vLLM's that are honoured.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from remora_agent.runtime.api import Constraint, Share
from remora_agent.runtime.options import MAX_STOP_TOKENS
from remora_agent.serving.call import SamplingOverrides, StoppingOverrides
from remora_agent.serving.limits import MAX_TEMPERATURE
from remora_agent.serving.openai.constraints import constraint
from remora_agent.serving.openai.errors import FieldInvalid
from remora_agent.serving.openai.fields import Fields, Refusals
from remora_agent.serving.openai.naming import ModelChoice, model_choice
from remora_contract.experiments import MAX_SESSION

MAX_CHOICES = 128  # answers of one request: n for each of its prompts
MAX_TOP_LOGPROBS = 20
_MAX_COUNT = (1 << 31) - 1
_MAX_SEED = (1 << 64) - 1
_MAX_NAME_CHARS = 256

# OpenAI's and vLLM's fields that are known and not carried out, with the values that change
# nothing and the reason.
UNSUPPORTED: Refusals = {
    "best_of": ((1,), "answers are not ranked"),
    "use_beam_search": ((False,), "there is no beam search"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "include_stop_str_in_output": ((False,), "an answer ends before its stop text"),
    "skip_special_tokens": ((True,), "special tokens are no text of an answer"),
    "spaces_between_special_tokens": ((True,), "special tokens are no text of an answer"),
    "truncate_prompt_tokens": ((), "a prompt is never cut in silence"),
    "prompt_logprobs": ((), "ask /v1/completions with echo and logprobs"),
    "logits_processors": (([],), "code of callers is not run"),
    "bad_words": (([],), "use logit_bias"),
    "allowed_token_ids": (([],), "use a constraint"),
    "return_tokens_as_token_ids": ((False,), "ask for logprobs"),
    "return_token_ids": ((False,), "ask for logprobs"),
    "kv_transfer_params": ((), "there is one device"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "moderation": ((), "there is no moderation"),
    "prediction": ((), "predicted outputs are not used"),
    "prompt_cache_key": ((), "prefixes are cached by content; cache_salt keeps them apart"),
    "prompt_cache_options": ((), "prefixes are cached by content"),
    "prompt_cache_retention": (("in_memory",), "prefixes are cached in memory"),
    "safety_identifier": ((), "say user"),
}


@dataclass(frozen=True)
class CommonOptions:
    choice: ModelChoice
    sampling: SamplingOverrides
    stopping: StoppingOverrides
    constraint: Constraint | None
    share: Share
    session: str
    n: int
    stream: bool
    include_usage: bool

    def seeded(self, index: int) -> SamplingOverrides:
        """Of the index-th of n answers: its own seed."""
        if self.sampling.seed is None:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + index) & _MAX_SEED)


def common_options(fields: Fields) -> CommonOptions:
    """Raises FieldInvalid, FieldUnsupported."""
    fields.refuse(UNSUPPORTED)
    choice = model_choice(fields)
    stream = fields.flag("stream") or False
    return CommonOptions(
        choice=choice,
        sampling=_sampling(fields),
        stopping=_stopping(fields),
        constraint=constraint(fields),
        share=share_of(fields),
        session=fields.text("session", MAX_SESSION) or "",
        n=fields.whole("n", 1, MAX_CHOICES) or 1,
        stream=stream,
        include_usage=_include_usage(fields, stream),
    )


def _sampling(fields: Fields) -> SamplingOverrides:
    top_p = fields.number("top_p", 0, 1)
    if top_p == 0:
        raise fields.wrong("top_p", "above 0 and at most 1", 0)
    top_k = fields.whole("top_k", -1, _MAX_COUNT)
    repetition = fields.number("repetition_penalty", 0, 100)
    if repetition == 0:
        raise fields.wrong("repetition_penalty", "above 0", 0)
    return SamplingOverrides(
        temperature=fields.number("temperature", 0, MAX_TEMPERATURE),
        top_k=0 if top_k == -1 else top_k,  # vLLM's -1 keeps all, as 0 does here
        top_p=top_p,
        seed=fields.whole("seed", 0, _MAX_SEED),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=repetition,
        presence_penalty=fields.number("presence_penalty", -2, 2),
        frequency_penalty=fields.number("frequency_penalty", -2, 2),
        logit_bias=_logit_bias(fields),
    )


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    given = fields.table("logit_bias") or {}
    inner = Fields(given, fields.path("logit_bias"))
    made = []
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise FieldInvalid(
                f"{inner.path(key[:80])}: the key must be a token id", fields.path("logit_bias")
            )
        bias = inner.number(key, -100, 100)
        if bias is None:
            raise inner.wrong(key, "a number", None)
        made.append((int(key), bias))
    if len({token for token, _ in made}) < len(made):
        raise FieldInvalid("logit_bias: a token id is given twice", fields.path("logit_bias"))
    return tuple(sorted(made))


def _stopping(fields: Fields) -> StoppingOverrides:
    old = fields.whole("max_tokens", 1, _MAX_COUNT)
    new = fields.whole("max_completion_tokens", 1, _MAX_COUNT)
    if old is not None and new is not None and old != new:
        raise FieldInvalid(
            "max_tokens and max_completion_tokens say different things; give one", "max_tokens"
        )
    stop_ids = fields.ids("stop_token_ids")
    if len(stop_ids) > MAX_STOP_TOKENS:
        raise FieldInvalid(f"stop_token_ids: at most {MAX_STOP_TOKENS}", "stop_token_ids")
    return StoppingOverrides(
        max_tokens=old if new is None else new,
        stop=fields.texts("stop"),
        stop_token_ids=stop_ids,
        ignore_eos=fields.flag("ignore_eos") or False,
        min_tokens=fields.whole("min_tokens", 0, _MAX_COUNT) or 0,
    )


def share_of(fields: Fields) -> Share:
    """vLLM's priority: the lower goes first; ours: the higher."""
    return Share(
        priority=-(fields.whole("priority", -_MAX_COUNT, _MAX_COUNT) or 0),
        client=fields.text("user", _MAX_NAME_CHARS) or "",
        cache_salt=fields.text("cache_salt", _MAX_NAME_CHARS) or "",
    )


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.table("stream_options")
    if given is None:
        return False
    if not stream:
        raise FieldInvalid("stream_options goes with stream", "stream_options")
    inner = Fields(given, "stream_options")
    include = inner.flag("include_usage") or False
    inner.refuse(
        {
            "include_obfuscation": ((False,), "chunks are not padded"),
            "continuous_usage_stats": ((False,), "usage comes once, with the last chunk"),
        }
    )
    inner.done()
    return include
