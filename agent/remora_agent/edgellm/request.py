"""A request as TensorRT Edge-LLM's runtime can be asked it; what it cannot do is refused by name.

Pure. `CANNOT` is the whole list: docs/edgellm.md is checked against it, and a test sees each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from remora_agent.runtime.api import AdapterRef, GenerationRequest
from remora_contract.errors import Unsupported


@dataclass(frozen=True)
class Limit:
    """A field of a request that this backend does not honour, and when a request asks for it."""

    field: str
    why: str
    asked: Callable[[GenerationRequest], bool]


CANNOT = (
    Limit("min_p", "its sampler has none", lambda r: r.sampling.min_p != 0.0),
    Limit(
        "repetition_penalty",
        "its sampler has none",
        lambda r: r.sampling.repetition_penalty != 1.0,
    ),
    Limit("presence_penalty", "its sampler has none", lambda r: r.sampling.presence_penalty != 0.0),
    Limit(
        "frequency_penalty", "its sampler has none", lambda r: r.sampling.frequency_penalty != 0.0
    ),
    Limit("logit_bias", "it is not passed on", lambda r: bool(r.sampling.logit_bias)),
    Limit("seed", "its promise was not tried", lambda r: r.sampling.seed is not None),
    Limit("stop_token_ids", "it stops at its own", lambda r: bool(r.stopping.stop_token_ids)),
    Limit("ignore_eos", "it always stops at its own", lambda r: r.stopping.ignore_eos),
    Limit("min_tokens", "it has no such bound", lambda r: r.stopping.min_tokens > 0),
    Limit("logprobs", "they are not passed on", lambda r: r.scoring.top is not None),
    Limit(
        "prompt_logprobs",
        "it gives no logits of a prompt",
        lambda r: r.scoring.prompt_top is not None or r.scoring.prompt_from is not None,
    ),
    Limit("constraint", "its own are not passed on", lambda r: r.constraint is not None),
    Limit(
        "tools",
        "the special tokens that mark calls are not shown",
        lambda r: bool(r.visible_tokens),
    ),
    Limit("priority", "requests are answered as they come", lambda r: r.share.priority != 0),
    Limit("adapters", "it runs one adapter at a time", lambda r: len(r.adapters) > 1),
    Limit("weight", "its adapters act in full", lambda r: any(a.weight != 1.0 for a in r.adapters)),
)

# Of a bundle's or a release's defaults.
CANNOT_DEFAULT = (
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
)


@dataclass(frozen=True)
class Question:
    """What goes to the child. `prompt` as its tokenizer reads it; `adapter` is a key of the map
    that the runtime was opened with, empty for the base model."""

    prompt: str
    prompt_tokens: int
    bos: str  # may stand before the prompt; the runtime may add its own
    adapter: str
    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()


def refuse(request: GenerationRequest) -> None:
    """Raises Unsupported naming the first field that is not honoured."""
    for limit in CANNOT:
        if limit.asked(request):
            raise Unsupported(f"{limit.field}: not with backend edgellm: {limit.why}; leave it out")


def refuse_mix(adapters: tuple[AdapterRef, ...], where: str) -> None:
    """Raises Unsupported for a composition."""
    if len(adapters) > 1 or any(a.weight != 1.0 for a in adapters):
        raise Unsupported(
            f"{where}: backend edgellm runs one adapter at a time, with weight 1; merge them into "
            "one adapter or use another backend"
        )


def question(
    request: GenerationRequest, prompt: str, bos: str, adapter: str, room: int
) -> Question:
    """`room`: the most tokens that the context leaves. Greedy is said as the likeliest one of one
    candidate, which needs no word of what its runtime makes of temperature 0."""
    sampling, stopping = request.sampling, request.stopping
    greedy = sampling.temperature == 0.0 or sampling.top_k == 1
    return Question(
        prompt,
        len(request.prompt),
        bos,
        adapter,
        1.0 if greedy else sampling.temperature,
        1 if greedy else sampling.top_k,
        1.0 if greedy else sampling.top_p,
        min(stopping.max_tokens, room),
        stopping.stop,
    )
