"""What a generation call asks for, before a runtime has turned it into tokens and defaults.

Frozen data shared by the surfaces (gRPC, batch file). Knows neither wire format nor runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from remora_agent.runtime.api import (
    AdapterRef,
    Constraint,
    Scoring,
    Share,
)
from remora_agent.runtime.api import (
    SamplingOverrides as SamplingOverrides,
)
from remora_agent.runtime.api import (
    StoppingOverrides as StoppingOverrides,
)
from remora_contract.release import WeightedName


@dataclass(frozen=True)
class Message:
    role: str  # one of ROLES
    content: str
    tool_calls: tuple[Mapping[str, Any], ...] = ()  # an assistant's: {"id", "type", "function"}
    tool_call_id: str = ""  # a tool's: the call it answers
    name: str = ""


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
    tools: tuple[Mapping[str, Any], ...] = ()  # {"type": "function", "function": {...}}
    tool_choice: str = ""  # auto, none, required or a function's name; empty: auto with tools
    parallel_tool_calls: bool = True  # False: one call at most


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
class GenerateCall:
    prompt: PromptInput
    selection: AdapterSelection = ()
    sampling: SamplingOverrides = field(default_factory=SamplingOverrides)
    stopping: StoppingOverrides = field(default_factory=StoppingOverrides)
    request_id: str | None = None  # None: the agent makes one
    constraint: Constraint | None = None
    scoring: Scoring = field(default_factory=Scoring)
    n: int = 1  # independent answers; the i-th has seed + i
    echo: bool = False  # the answer's text begins with the prompt's
    share: Share = field(default_factory=Share)
    trace_parent: str = ""  # W3C traceparent of the caller
    session: str = ""  # whose arm of an experiment it gets; empty: the client's
    lot: str = ""  # drawn by the agent, where neither is given
