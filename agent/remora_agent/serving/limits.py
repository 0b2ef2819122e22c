"""Bounds of a request, checked before anything is tokenised or queued. Pure."""

from __future__ import annotations

import math

from remora_agent.runtime import bounds
from remora_agent.runtime.api import AdapterRef, SamplingOverrides, StoppingOverrides
from remora_agent.runtime.grammar import check_constraint
from remora_agent.runtime.options import MAX_ID_CHARS, MAX_STOP_TOKENS, RuntimeOptions
from remora_agent.runtime.sharing import check_share
from remora_agent.serving.call import (
    ROLES,
    AdapterSelection,
    ChatPrompt,
    GenerateCall,
    PromptInput,
    TextPrompt,
    UseCaseRef,
)
from remora_agent.serving.chat_prompt import check_chat_tools
from remora_contract.artifact import check_name
from remora_contract.errors import RequestInvalid
from remora_contract.experiments import MAX_SESSION
from remora_contract.release import MAX_WEIGHT, WeightedName, check_use_case_name
from remora_contract.sampling_bounds import Range

MAX_MESSAGE_BYTES = 4 << 20  # of one gRPC message, in either direction
MAX_MESSAGES = 1024
MAX_TEMPERATURE = 100.0
_RUNTIME = RuntimeOptions()


def check_call(call: GenerateCall) -> GenerateCall:
    """Returns `call`. Raises RequestInvalid naming the field that is out of range."""
    if call.request_id is not None:
        check_request_id(call.request_id)
    check_prompt(call.prompt)
    check_selection(call.selection)
    check_sampling(call.sampling)
    check_stopping(call.stopping)
    check_share(call.share)
    check_session(call.session)
    bounds.check_scoring(call.scoring)
    bounds.check_choices(call.n)
    _check_constraint(call)
    return call


def _check_constraint(call: GenerateCall) -> None:
    if call.constraint is None:
        return
    check_constraint(call.constraint)
    if call.stopping.ignore_eos:
        raise RequestInvalid(
            "stopping.ignore_eos: an answer with a constraint ends where that is satisfied; "
            "leave one of them out"
        )


def check_request_id(request_id: str) -> str:
    if not 0 < len(request_id) <= MAX_ID_CHARS or not request_id.isprintable():
        raise RequestInvalid(
            f"request_id must be 1 to {MAX_ID_CHARS} printable characters, not {request_id[:40]!r}"
        )
    return request_id


def check_session(session: str) -> str:
    if len(session) > MAX_SESSION:
        raise RequestInvalid(f"session: at most {MAX_SESSION} characters, not {len(session)}")
    return session


def check_prompt(prompt: PromptInput) -> PromptInput:
    if isinstance(prompt, ChatPrompt):
        _check_chat(prompt)
    elif isinstance(prompt, TextPrompt):
        if not prompt.text:
            raise RequestInvalid("text: the prompt is empty; give at least one character")
    elif not prompt.ids:
        raise RequestInvalid("token_ids: the prompt is empty; give at least one token")
    return prompt


def _check_chat(chat: ChatPrompt) -> None:
    if not 0 < len(chat.messages) <= MAX_MESSAGES:
        raise RequestInvalid(
            f"chat.messages: give 1 to {MAX_MESSAGES} messages, not {len(chat.messages)}"
        )
    for i, message in enumerate(chat.messages):
        if message.role not in ROLES:
            raise RequestInvalid(
                f"chat.messages[{i}].role: {message.role[:40]!r} is not one of {', '.join(ROLES)}"
            )
    check_chat_tools(chat)


def check_selection(selection: AdapterSelection) -> AdapterSelection:
    if isinstance(selection, UseCaseRef):
        check_use_case_name(selection.name, "use_case")
        _check_overrides(selection.weights)
        return selection
    if len(selection) > _RUNTIME.max_mix:
        raise RequestInvalid(
            f"adapters: at most {_RUNTIME.max_mix} in one mix, not {len(selection)}"
        )
    for ref in selection:
        check_adapter(ref)
    names = [(ref.name, ref.revision) for ref in selection]
    for name in names:
        if names.count(name) > 1:
            raise RequestInvalid(f"adapters: {name[0]} is listed twice; add the weights up instead")
    return selection


def _check_overrides(weights: tuple[WeightedName, ...]) -> None:
    """Whether the use case has these adapters shows when its name is settled."""
    names = [w.name for w in weights]
    if len(names) > _RUNTIME.max_mix:
        raise RequestInvalid(f"use_case_weights: at most {_RUNTIME.max_mix}, not {len(names)}")
    for given in weights:
        check_name(given.name, "use_case_weights: adapter name")
        if names.count(given.name) > 1:
            raise RequestInvalid(f"use_case_weights: {given.name} is listed twice")
        _check_weight(given.name, given.weight, "use_case_weights")


def named_adapter(text: str, weight: float = 1.0) -> AdapterRef:
    """`NAME` or `NAME@REVISION`. Raises RequestInvalid for an `@` with no revision behind it."""
    name, at, revision = text.partition("@")
    if at and not revision:
        raise RequestInvalid(f"{text[:140]!r} names no revision behind the @; leave the @ out")
    return AdapterRef(name, revision or None, weight)


def check_adapter(ref: AdapterRef) -> AdapterRef:
    check_name(ref.name, "adapter name")
    if ref.revision is not None:
        check_name(ref.revision, "adapter revision")
    _check_weight(ref.name, ref.weight, "adapters")
    return ref


def _check_weight(name: str, weight: float, where: str) -> None:
    if not math.isfinite(weight) or abs(weight) > MAX_WEIGHT:
        raise RequestInvalid(
            f"{where}: weight of {name} must be a number in "
            f"-{MAX_WEIGHT:g}..{MAX_WEIGHT:g}, not {weight}"
        )


def check_sampling(sampling: SamplingOverrides) -> SamplingOverrides:
    if sampling.temperature is not None:
        Range(0, MAX_TEMPERATURE, "0 is greedy").check("sampling.temperature", sampling.temperature)
    bounds.check_sampling(sampling, "sampling.")
    return sampling


def check_stopping(stopping: StoppingOverrides) -> StoppingOverrides:
    if stopping.max_tokens is not None and stopping.max_tokens < 1:
        raise RequestInvalid(f"stopping.max_tokens must be at least 1, not {stopping.max_tokens}")
    if len(stopping.stop) > _RUNTIME.max_stop_strings:
        raise RequestInvalid(
            f"stopping.stop: at most {_RUNTIME.max_stop_strings} strings, not {len(stopping.stop)}"
        )
    if stopping.min_tokens is not None and stopping.min_tokens < 0:
        raise RequestInvalid(f"stopping.min_tokens must be 0 or more, not {stopping.min_tokens}")
    for i, text in enumerate(stopping.stop):
        if not 0 < len(text) <= _RUNTIME.max_stop_chars:
            raise RequestInvalid(
                f"stopping.stop[{i}] must have 1 to {_RUNTIME.max_stop_chars} characters, "
                f"not {len(text)}"
            )
    if len(stopping.stop_token_ids) > MAX_STOP_TOKENS:
        raise RequestInvalid(
            f"stopping.stop_token_ids: at most {MAX_STOP_TOKENS}, "
            f"not {len(stopping.stop_token_ids)}"
        )
    return stopping
