"""What a client hears back, typed: built from wire messages. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from remora_agent.runtime.api import (
    AnsweringAdapter,
    FinishReason,
    Provenance,
    ServedArm,
    Timings,
    TokenLogprob,
    ToolCall,
    Usage,
)
from remora_contract.errors import InternalFault
from remora_protos.inference.v1 import inference_pb2 as pb

_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_TIERS = {pb.TIER_DISK: "disk", pb.TIER_HOST: "host", pb.TIER_BANK: "bank"}


@dataclass(frozen=True)
class Delta:
    """Whole UTF-8 characters and the tokens they came from; either may be empty, not both."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token, when asked for
    choice: int = 0  # which of the n answers


@dataclass(frozen=True)
class Result:
    """A finished answer and the immutable identities behind it."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_match: str  # the stop string that ended the text; empty when none did
    usage: Usage
    timings: Timings
    provenance: Provenance
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one for each token, when asked for
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # from the prompt's second token on
    more: tuple[Result, ...] = ()  # the answers after the first, with n


@dataclass(frozen=True)
class Embeddings:
    """In the order of the inputs."""

    vectors: tuple[tuple[float, ...], ...]  # [inputs][hidden]
    prompt_tokens: tuple[int, ...]
    provenance: Provenance


@dataclass(frozen=True)
class Tokens:
    ids: tuple[int, ...]
    rendered: str  # the text that was tokenised


@dataclass(frozen=True)
class Adapter:
    name: str
    revision: str
    digest: str
    tier: str  # disk, host or bank
    rank: int
    bank_bytes: int
    pinned: bool
    leases: int  # requests using it now
    draining: bool
    alias_target: bool  # new requests for the name use this revision
    invocation_tokens: tuple[int, ...] = ()  # acts from these in the prompt on; empty: always


@dataclass(frozen=True)
class Alias:
    name: str
    revision: str
    digest: str
    epoch: int  # hand it to set_alias to swap only if nobody else did


@dataclass(frozen=True)
class Adapters:
    adapters: tuple[Adapter, ...]
    aliases: tuple[Alias, ...]


@dataclass(frozen=True)
class Capacity:
    max_rank: int
    used_rank: int
    evictable_rank: int
    more_adapters: int
    max_bytes: int | None  # of all resident adapters; None: bounded by rank alone
    used_bytes: int
    host_max_bytes: int
    host_used_bytes: int


@dataclass(frozen=True)
class UseCase:
    name: str
    adapters: dict[str, float]


@dataclass(frozen=True)
class UseCaseCounts:
    """Since the agent started. `use_case` "(other)": those it does not tell apart any more."""

    use_case: str
    requests: int  # that have ended, failed ones included
    requests_failed: int
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class EngineStatus:
    backend: str
    bundle_digest: str
    engine_digest: str
    model_name: str
    context_tokens: int
    rows: int
    rows_busy: int
    queued: int
    requests_served: int
    requests_failed: int
    tokens_generated: int
    state: str  # loading, serving or draining


def result(response: pb.GenerateResponse) -> Result:
    """Raises InternalFault when the answer has no known finish reason."""
    made = ended(
        response.request_id,
        response.text,
        response.token_ids,
        response.finished,
        map(token_logprob, response.logprobs),
    )
    scored = tuple(map(token_logprob, response.prompt_logprobs))
    return replace(made, prompt_logprobs=scored, more=tuple(map(result, response.more)))


def token_logprob(message: pb.TokenLogprob) -> TokenLogprob:
    top = tuple((ranked.token_id, ranked.logprob) for ranked in message.top)
    return TokenLogprob(message.token_id, message.logprob, top)


def delta(message: pb.TextDelta, choice: int) -> Delta:
    logprobs = tuple(map(token_logprob, message.logprobs))
    return Delta(message.text, tuple(message.token_ids), logprobs, choice)


def ended(
    request_id: str,
    text: str,
    ids: Iterable[int],
    finished: pb.Finished,
    logprobs: Iterable[TokenLogprob] = (),
) -> Result:
    if finished.finish_reason not in _REASONS:
        raise InternalFault(
            f"request {request_id}: finish reason {finished.finish_reason} is unknown to this "
            "client; update it"
        )
    return Result(
        request_id=request_id,
        text=text,
        token_ids=tuple(ids),
        finish_reason=_REASONS[finished.finish_reason],
        stop_match=finished.stop_match,
        usage=Usage(
            finished.usage.prompt_tokens,
            finished.usage.cached_tokens,
            finished.usage.completion_tokens,
        ),
        timings=Timings(
            finished.timings.queue_s,
            finished.timings.prefill_s,
            finished.timings.decode_s,
            finished.timings.time_to_first_token_s,
        ),
        provenance=provenance(finished.provenance),
        tool_calls=tuple(
            ToolCall(call.id, call.name, call.arguments_json) for call in finished.tool_calls
        ),
        logprobs=tuple(logprobs),
    )


def embeddings(response: pb.EmbedResponse) -> Embeddings:
    return Embeddings(
        tuple(tuple(e.values) for e in response.embeddings),
        tuple(e.prompt_tokens for e in response.embeddings),
        provenance(response.provenance),
    )


def provenance(message: pb.Provenance) -> Provenance:
    return Provenance(
        bundle_digest=message.bundle_digest,
        engine_digest=message.engine_digest,
        adapters=tuple(
            AnsweringAdapter(
                a.name, a.revision, a.digest, a.weight, None if a.not_invoked else a.active_from
            )
            for a in message.adapters
        ),
        arm=ServedArm(message.experiment, message.arm) if message.experiment else None,
    )


def adapter(info: pb.AdapterInfo) -> Adapter:
    return Adapter(
        name=info.name,
        revision=info.revision,
        digest=info.digest,
        tier=_TIERS.get(info.tier, "unknown"),
        rank=info.rank,
        bank_bytes=info.bank_bytes,
        pinned=info.pinned,
        leases=info.leases,
        draining=info.draining,
        alias_target=info.alias_target,
        invocation_tokens=tuple(info.invocation_tokens),
    )


def alias(info: pb.AliasInfo) -> Alias:
    return Alias(info.name, info.revision, info.digest, info.epoch)


def adapters(response: pb.ListAdaptersResponse) -> Adapters:
    return Adapters(
        tuple(adapter(a) for a in response.adapters), tuple(alias(a) for a in response.aliases)
    )


def capacity(response: pb.CapacityResponse) -> Capacity:
    return Capacity(
        response.max_rank,
        response.used_rank,
        response.evictable_rank,
        response.more_adapters,
        response.max_bytes or None,
        response.used_bytes,
        response.host_max_bytes,
        response.host_used_bytes,
    )


def use_case(message: pb.UseCase) -> UseCase:
    return UseCase(message.name, {a.name: a.weight for a in message.adapters})


def use_case_counts(message: pb.UseCaseCounts) -> UseCaseCounts:
    return UseCaseCounts(
        use_case=message.use_case,
        requests=message.requests,
        requests_failed=message.requests_failed,
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
    )


def tokens(response: pb.TokenizeResponse) -> Tokens:
    return Tokens(tuple(response.token_ids), response.rendered)


def engine_status(message: pb.EngineStatus) -> EngineStatus:
    return EngineStatus(
        backend=message.backend,
        bundle_digest=message.bundle_digest,
        engine_digest=message.engine_digest,
        model_name=message.model_name,
        context_tokens=message.context_tokens,
        rows=message.rows,
        rows_busy=message.rows_busy,
        queued=message.queued,
        requests_served=message.requests_served,
        requests_failed=message.requests_failed,
        tokens_generated=message.tokens_generated,
        state=message.state,
    )
