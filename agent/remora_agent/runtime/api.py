"""The runtime's words: what a surface hands in and what it hears back. Frozen data, no behaviour.

Surfaces (gRPC, batch file) translate to and from these; the scheduler knows nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from remora_contract.errors import RemoraError


@dataclass(frozen=True)
class AdapterRef:
    """An adapter as a request names it; no `revision`: the alias's at admission."""

    name: str
    revision: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class SamplingParams:
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int | None = None  # None: drawn at admission
    min_p: float = 0.0  # of the likeliest token's probability; 0: off
    repetition_penalty: float = 1.0  # > 0, over prompt and answer
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what its logit gets; each id once


@dataclass(frozen=True)
class StoppingParams:
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # no end-of-sequence or stop token before


@dataclass(frozen=True)
class SamplingOverrides:
    """What a request asks for. None: the release's default, then the bundle's, then greedy."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class StoppingOverrides:
    """None: as for sampling, then the agent's default."""

    max_tokens: int | None = None  # also clipped to what the context leaves
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int | None = None


class ConstraintKind(Enum):
    JSON_SCHEMA = "json_schema"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    LARK = "lark"
    CHOICE = "choice"


@dataclass(frozen=True)
class Constraint:
    """What the answer's text must be. `text` is the schema, expression or grammar; empty for
    JSON_OBJECT and CHOICE."""

    kind: ConstraintKind
    text: str = ""
    options: tuple[str, ...] = ()  # of CHOICE


@dataclass(frozen=True)
class Scoring:
    """Which logprobs a request wants: None none, 0 the token's own, n also the n likeliest."""

    top: int | None = None  # of the answer's tokens
    prompt_top: int | None = None  # of the prompt's
    # From here on the prompt is an answer, given to be scored: nothing before it is scored, and
    # what invokes an adapter is looked for before it alone.
    prompt_from: int | None = None


@dataclass(frozen=True)
class Share:
    """How a request competes with others."""

    priority: int = 0  # higher first
    client: str = ""  # whom the caller names: clients of one connection share its part fairly
    cache_salt: str = ""  # prefixes are cached apart for each
    owner: str = ""  # who is connected, as the surface saw it; owners share the rows fairly


@dataclass(frozen=True)
class ServedArm:
    """The arm of an experiment that answers; see remora_contract.experiments. `mix`: what the
    release says that it runs, as digests with weights; `identity` stands for it in statistics."""

    experiment: str
    name: str
    identity: str = ""
    mix: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    request_id: str
    prompt: tuple[int, ...]
    adapters: tuple[AdapterRef, ...]
    sampling: SamplingParams
    stopping: StoppingParams
    deadline_s: float | None = None  # on the runtime's clock; None: none
    constraint: Constraint | None = None
    scoring: Scoring = field(default_factory=Scoring)
    share: Share = field(default_factory=Share)
    arm: ServedArm | None = None  # of the experiment that chose the adapters
    visible_tokens: tuple[int, ...] = ()  # special tokens whose text the answer shows


class FinishReason(Enum):
    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class AnsweringAdapter:
    name: str
    revision: str
    digest: str
    weight: float
    active_from: int | None = 0  # first prompt token it acted on; None: it was not invoked


@dataclass(frozen=True)
class Provenance:
    """The immutable identities behind an answer."""

    bundle_digest: str
    engine_digest: str
    adapters: tuple[AnsweringAdapter, ...] = ()
    arm: ServedArm | None = None


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    queue_s: float
    prefill_s: float
    decode_s: float
    time_to_first_token_s: float


@dataclass(frozen=True)
class Accepted:
    request_id: str
    provenance: Provenance


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities before temperature, penalties and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # token id, logprob; likeliest first


@dataclass(frozen=True)
class PromptScored:
    """Of the prompt's tokens from the second on; before the first Delta, when asked for."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Delta:
    """Whole UTF-8 characters and the tokens they came from; either may be empty, not both."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token, when asked for


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote; the arguments are JSON as it wrote them."""

    id: str
    name: str
    arguments_json: str


@dataclass(frozen=True)
class Finished:
    reason: FinishReason
    usage: Usage
    timings: Timings
    provenance: Provenance
    stop_match: str = ""
    tool_calls: tuple[ToolCall, ...] = ()  # found by the surface, in a chat with tools


@dataclass(frozen=True)
class Failed:
    error: RemoraError = field(compare=False)


Event = Accepted | PromptScored | Delta | Finished | Failed
# Called on the step thread, quickly and without raising: Accepted first, Finished or Failed last.
OnEvent = Callable[[Event], None]
