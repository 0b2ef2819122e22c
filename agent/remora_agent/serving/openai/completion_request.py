"""The body of POST /v1/completions: every field is carried over or refused by name. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remora_agent.runtime.api import Scoring
from remora_agent.serving.call import GenerateCall, TextPrompt, TokenPrompt
from remora_agent.serving.limits import check_call
from remora_agent.serving.openai.errors import FieldInvalid
from remora_agent.serving.openai.fields import Fields, Refusals, is_ids
from remora_agent.serving.openai.options import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    CommonOptions,
    common_options,
)

_UNSUPPORTED: Refusals = {
    "suffix": (("",), "text is not filled in before a suffix"),
    "prompt_embeds": ((), "prompts are text or token ids"),
}


@dataclass(frozen=True)
class CompletionRequest:
    options: CommonOptions
    calls: tuple[GenerateCall, ...]  # n for the first prompt, n for the next, …
    echo: bool


def completion_request(body: Mapping[str, Any]) -> CompletionRequest:
    """Raises FieldInvalid, FieldUnsupported, and what `limits.check_call` raises."""
    fields = Fields(body)
    best_of = fields.take("best_of")
    options = common_options(fields)
    if best_of not in (None, 1, options.n) or isinstance(best_of, bool):
        raise FieldInvalid("best_of: answers are not ranked; leave it out", "best_of")
    special = fields.flag("add_special_tokens")
    prompts = prompts_of(fields, "prompt", True if special is None else special)
    if len(prompts) * options.n > MAX_CHOICES:
        raise FieldInvalid(
            f"prompt: {len(prompts)} prompts with n {options.n} are more than {MAX_CHOICES} "
            "answers; send several requests",
            "prompt",
        )
    echo = fields.flag("echo") or False
    scoring = _scoring(fields, echo)
    fields.refuse(_UNSUPPORTED)
    fields.done()
    calls = tuple(
        GenerateCall(
            prompt=prompt,
            sampling=options.seeded(i),
            stopping=options.stopping,
            constraint=options.constraint,
            scoring=scoring,
            share=options.share,
            session=options.session,
        )
        for prompt in prompts
        for i in range(options.n)
    )
    for call in calls[:: options.n]:
        check_call(call)
    return CompletionRequest(options, calls, echo)


def prompts_of(
    fields: Fields, name: str, add_special_tokens: bool
) -> list[TextPrompt | TokenPrompt]:
    """A text, a list of texts, token ids, or a list of those. Raises FieldInvalid."""
    value = fields.take(name)
    if isinstance(value, str):
        return [TextPrompt(value, add_special_tokens)]
    if not isinstance(value, list) or not value:
        raise fields.wrong(name, "text, token ids, or a list of either", value)
    if all(isinstance(v, str) for v in value):
        return [TextPrompt(text, add_special_tokens) for text in value]
    if is_ids(value):
        return [TokenPrompt(tuple(value))]
    if all(is_ids(v) for v in value):
        return [TokenPrompt(tuple(ids)) for ids in value]
    raise fields.wrong(name, "text, token ids, or a list of either", value)


def _scoring(fields: Fields, echo: bool) -> Scoring:
    top = fields.whole("logprobs", 0, MAX_TOP_LOGPROBS)
    return Scoring(top=top, prompt_top=top if echo else None)
