"""What a call for embeddings asks for, on any surface, and its bounds. Pure; no wire format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from remora_agent.runtime.api import Failed, Finished, FinishReason, Share, Timings, Usage
from remora_agent.runtime.embedding import Embedded, Pooling
from remora_agent.runtime.options import MAX_EMBEDDINGS
from remora_agent.serving.call import AdapterSelection, TextPrompt, TokenPrompt
from remora_agent.serving.limits import check_prompt, check_selection
from remora_contract.errors import RequestInvalid


@dataclass(frozen=True)
class EmbedCall:
    inputs: tuple[TextPrompt | TokenPrompt, ...]
    pooling: Pooling = Pooling.LAST
    normalize: bool = True  # to length 1
    selection: AdapterSelection = ()
    share: Share = field(default_factory=Share)
    trace_parent: str = ""  # W3C traceparent of the caller


def check_embed(call: EmbedCall) -> EmbedCall:
    """Returns `call`. Raises RequestInvalid naming what is out of range."""
    if not 0 < len(call.inputs) <= MAX_EMBEDDINGS:
        raise RequestInvalid(f"inputs: give 1 to {MAX_EMBEDDINGS}, not {len(call.inputs)}")
    for index, prompt in enumerate(call.inputs):
        _check_input(index, prompt)
    check_selection(call.selection)
    return call


def _check_input(index: int, prompt: TextPrompt | TokenPrompt) -> None:
    try:
        check_prompt(prompt)
    except RequestInvalid as e:
        raise RequestInvalid(f"inputs[{index}]: {e}") from e


def as_event(end: Embedded | Failed) -> Finished | Failed:
    """The same end as listeners of generation know it: a request of one long prompt."""
    if isinstance(end, Failed):
        return end
    whole_s = end.queue_s + end.prefill_s
    return Finished(
        FinishReason.STOP,
        Usage(sum(end.prompt_tokens), 0, 0),
        Timings(end.queue_s, end.prefill_s, 0.0, whole_s),
        end.provenance,
    )


def joined(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """All tokens of all prompts."""
    return tuple(token for prompt in prompts for token in prompt)
