"""remora.inference.v1 messages <-> the agent's own words, for adapters and the engine. Pure."""

from __future__ import annotations

from remora_agent.bank.directory import Alias, UseCase
from remora_agent.bank.policy import BankCapacity
from remora_agent.runtime.adapters import AdapterInfo, Tier, UnloadMode
from remora_agent.runtime.status import RuntimeStatus
from remora_agent.serving.limits import check_selection
from remora_agent.serving.use_case_counts import UseCaseCount
from remora_agent.serving.wire import adapter_ref
from remora_contract.errors import RequestInvalid
from remora_contract.release import BASE_USE_CASES, WeightedName
from remora_protos.inference.v1 import inference_pb2 as pb

_TIERS = {Tier.DISK: pb.TIER_DISK, Tier.HOST: pb.TIER_HOST, Tier.BANK: pb.TIER_BANK}
_UNLOAD = {
    pb.UNLOAD_MODE_UNSPECIFIED: UnloadMode.GRACEFUL,
    pb.UNLOAD_MODE_GRACEFUL: UnloadMode.GRACEFUL,
    pb.UNLOAD_MODE_CANCEL: UnloadMode.CANCEL,
    pb.UNLOAD_MODE_REFUSE_IF_BUSY: UnloadMode.REFUSE_IF_BUSY,
}


def unload_mode(mode: int) -> UnloadMode:
    """Raises RequestInvalid for a mode of a newer protocol."""
    for value, meaning in _UNLOAD.items():
        if value == mode:
            return meaning
    raise RequestInvalid(f"mode {mode} is unknown to this agent")


def adapter_info(info: AdapterInfo) -> pb.AdapterInfo:
    return pb.AdapterInfo(
        name=info.name,
        revision=info.revision,
        digest=info.digest,
        tier=_TIERS[info.tier],
        rank=info.rank,
        bank_bytes=info.bank_bytes,
        pinned=info.pinned,
        leases=info.leases,
        draining=info.draining,
        alias_target=info.alias_target,
        invocation_tokens=info.invocation_tokens,
    )


def alias_info(alias: Alias) -> pb.AliasInfo:
    return pb.AliasInfo(
        name=alias.name, revision=alias.revision, digest=alias.digest, epoch=alias.epoch
    )


def capacity(capacity: BankCapacity) -> pb.CapacityResponse:
    return pb.CapacityResponse(
        max_rank=capacity.limits.rank,
        used_rank=capacity.used.rank,
        evictable_rank=capacity.evictable_rank,
        more_adapters=capacity.more_adapters,
        max_bytes=capacity.limits.bytes or 0,
        used_bytes=capacity.used.bytes,
        host_max_bytes=capacity.host_max_bytes,
        host_used_bytes=capacity.host_used_bytes,
    )


def use_case(use_case: UseCase) -> pb.UseCase:
    return pb.UseCase(
        name=use_case.name,
        adapters=[pb.WeightedAdapter(name=a.name, weight=a.weight) for a in use_case.adapters],
    )


def use_case_counts(name: str, count: UseCaseCount) -> pb.UseCaseCounts:
    return pb.UseCaseCounts(
        use_case=name,
        requests=count.requests,
        requests_failed=count.failures,
        prompt_tokens=count.prompt_tokens,
        completion_tokens=count.tokens,
    )


def weighted_names(use_case: pb.UseCase) -> tuple[WeightedName, ...]:
    """Raises RequestInvalid: a use case follows aliases and cannot fix a revision."""
    if not use_case.adapters and use_case.name not in BASE_USE_CASES:
        raise RequestInvalid(f"use case {use_case.name}: name at least one adapter")
    refs = tuple(adapter_ref(a) for a in use_case.adapters)
    check_selection(refs)
    for ref in refs:
        if ref.revision is not None:
            raise RequestInvalid(
                f"use case {use_case.name}: it follows the alias of {ref.name}; "
                "leave the revision out"
            )
    return tuple(WeightedName(ref.name, ref.weight) for ref in refs)


def engine_status(status: RuntimeStatus, state: str) -> pb.EngineStatus:
    """`state`: loading, serving or draining, as the process sees it."""
    return pb.EngineStatus(
        backend=status.backend,
        bundle_digest=status.bundle_digest,
        engine_digest=status.engine_digest,
        model_name=status.model_name,
        context_tokens=status.context_tokens,
        rows=status.rows,
        rows_busy=status.rows_busy,
        queued=status.queued,
        requests_served=status.requests_served,
        requests_failed=status.requests_failed,
        tokens_generated=status.tokens_generated,
        state=state,
    )
