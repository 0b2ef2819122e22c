"""What a generation call asks for, before a runtime has turned it into tokens and defaults.

Frozen data shared by the surfaces (gRPC, batch file). Knows neither wire format nor runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from remora_agent.runtime.api import AdapterRef
from remora_contract.release import WeightedName


@dataclass(frozen=True)
class Message:
    role: str  # one of ROLES
    content: str


ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class TextPrompt:
    """Tokenised as it is, without a template; special tokens as the tokenizer adds them."""

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True)
class ChatPrompt:
    """Rendered by the bundle's chat template."""

    messages: tuple[Message, ...]
    add_generation_prompt: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)  # extra template variables


@dataclass(frozen=True)
class TokenPrompt:
    """Used as it is."""

    ids: tuple[int, ...]


PromptInput = TextPrompt | ChatPrompt | TokenPrompt


@dataclass(frozen=True)
class UseCaseRef:
    """`weights` replace those of the use case's own adapters, for this call alone."""

    name: str
    weights: tuple[WeightedName, ...] = ()


# An empty tuple is the base model alone.
AdapterSelection = tuple[AdapterRef, ...] | UseCaseRef


@dataclass(frozen=True)
class SamplingOverrides:
    """None: the release's default, then the bundle's generation config, then greedy."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class StoppingOverrides:
    max_tokens: int | None = None  # None: the release's default, then what the context leaves
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerateCall:
    prompt: PromptInput
    selection: AdapterSelection = ()
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    stopping: StoppingOverrides = field(default_factory=StoppingOverrides)
    request_id: str | None = None  # None: the agent makes one
