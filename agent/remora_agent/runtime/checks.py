"""Is a request well formed and within this engine's limits? Pure; raises the first fault found."""

from __future__ import annotations

from remora_agent.engine.protocol import EngineLimits
from remora_agent.runtime.api import AdapterRef, GenerationRequest, SamplingParams, StoppingParams
from remora_agent.runtime.bounds import check_prompt_scores, check_sampling, check_scoring
from remora_agent.runtime.embedding import EmbeddingRequest
from remora_agent.runtime.options import (
    CHOICE_ID_CHARS,
    MAX_EMBEDDINGS,
    MAX_ID_CHARS,
    MAX_STOP_TOKENS,
    RuntimeOptions,
)
from remora_agent.runtime.sharing import check_share
from remora_contract.errors import DeadlineExceeded, PromptTooLong, RequestInvalid, Unsupported
from remora_contract.release import MAX_WEIGHT


def check_request(
    request: GenerationRequest, limits: EngineLimits, options: RuntimeOptions, now: float
) -> None:
    """Raises RequestInvalid, PromptTooLong, DeadlineExceeded, Unsupported."""
    if not 0 < len(request.request_id) <= MAX_ID_CHARS + CHOICE_ID_CHARS:
        raise RequestInvalid(f"request_id must have 1 to {MAX_ID_CHARS} characters")
    if request.deadline_s is not None and now >= request.deadline_s:
        raise DeadlineExceeded("the deadline had passed when the request arrived")
    _check_prompt(request.prompt, limits)
    check_sampling(request.sampling)
    _check_biases(request.sampling, limits)
    _check_stopping(request.stopping, options)
    _check_scoring(request, limits)
    check_adapters(request.adapters, options)
    check_share(request.share)


def check_embedding(
    request: EmbeddingRequest, limits: EngineLimits, options: RuntimeOptions, now: float
) -> None:
    """Raises Unsupported, RequestInvalid, PromptTooLong, DeadlineExceeded."""
    if not limits.hidden:
        raise Unsupported("this engine gives no states: it cannot embed")
    if not 0 < len(request.prompts) <= MAX_EMBEDDINGS:
        raise RequestInvalid(f"give 1 to {MAX_EMBEDDINGS} inputs, not {len(request.prompts)}")
    if not 0 < len(request.request_id) <= MAX_ID_CHARS:
        raise RequestInvalid(f"request_id must have 1 to {MAX_ID_CHARS} characters")
    total = sum(map(len, request.prompts))
    if total > options.max_waiting_tokens:
        raise RequestInvalid(
            f"the inputs have {total} tokens together; at most {options.max_waiting_tokens} are "
            "taken in one request"
        )
    if request.deadline_s is not None and now >= request.deadline_s:
        raise DeadlineExceeded("the deadline had passed when the request arrived")
    for index, prompt in enumerate(request.prompts):
        _check_input(index, prompt, limits)
    check_adapters(request.adapters, options)
    check_share(request.share)


def _check_input(index: int, prompt: tuple[int, ...], limits: EngineLimits) -> None:
    try:
        _check_prompt(prompt, limits)
    except (RequestInvalid, PromptTooLong) as e:
        raise type(e)(f"inputs[{index}]: {e}") from e


def _check_prompt(prompt: tuple[int, ...], limits: EngineLimits) -> None:
    if not prompt:
        raise RequestInvalid("the prompt is empty; give at least one token")
    if len(prompt) >= limits.context:
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens; the context holds {limits.context}, and one "
            "must be left for the answer"
        )
    if min(prompt) < 0 or max(prompt) >= limits.vocab:
        wrong = min(prompt) if min(prompt) < 0 else max(prompt)
        raise RequestInvalid(f"token {wrong} is outside the vocabulary 0..{limits.vocab - 1}")


def _check_biases(sampling: SamplingParams, limits: EngineLimits) -> None:
    for token, _ in sampling.logit_bias:
        if not 0 <= token < limits.vocab:
            raise RequestInvalid(
                f"logit_bias: token {token} is outside the vocabulary 0..{limits.vocab - 1}"
            )


def _check_scoring(request: GenerationRequest, limits: EngineLimits) -> None:
    check_scoring(request.scoring)
    top = request.scoring.prompt_top
    if top is None:
        return
    if limits.scored < 1:
        raise Unsupported("prompt_logprobs: not with this engine; leave it out")
    first = request.scoring.prompt_from or 0
    if not 0 <= first <= len(request.prompt):
        raise RequestInvalid(f"prompt_from: the prompt has no token {first}")
    check_prompt_scores(top, [len(request.prompt) - first])


def _check_stopping(stopping: StoppingParams, options: RuntimeOptions) -> None:
    if stopping.max_tokens < 1:
        raise RequestInvalid(f"max_tokens must be at least 1, not {stopping.max_tokens}")
    if not 0 <= stopping.min_tokens <= stopping.max_tokens:
        raise RequestInvalid(
            f"min_tokens must be in 0..max_tokens ({stopping.max_tokens}), "
            f"not {stopping.min_tokens}"
        )
    if len(stopping.stop) > options.max_stop_strings:
        raise RequestInvalid(
            f"{len(stopping.stop)} stop strings; at most {options.max_stop_strings} are allowed"
        )
    if not all(0 < len(text) <= options.max_stop_chars for text in stopping.stop):
        raise RequestInvalid(f"a stop string must have 1 to {options.max_stop_chars} characters")
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        raise RequestInvalid(f"at most {MAX_STOP_TOKENS} stop_token_ids are allowed")


def check_adapters(adapters: tuple[AdapterRef, ...], options: RuntimeOptions) -> None:
    """Raises RequestInvalid for a mix no request may have."""
    if len(adapters) > options.max_mix:
        raise RequestInvalid(
            f"{len(adapters)} adapters in one request; at most {options.max_mix} are allowed"
        )
    if len({(a.name, a.revision) for a in adapters}) < len(adapters):
        raise RequestInvalid("an adapter is named twice in the request; add up its weights")
    for a in adapters:
        if not abs(a.weight) <= MAX_WEIGHT:
            raise RequestInvalid(
                f"weight {a.weight} of adapter {a.name[:80]} is not within ±{MAX_WEIGHT:g}"
            )
