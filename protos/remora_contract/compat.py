"""May this adapter go on that bundle, that release on this device? Pure; all refusals at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from remora_contract.adapter import Adapter, TargetRank
from remora_contract.bundle import Bundle
from remora_contract.digests import short
from remora_contract.engine import PROCESSORS
from remora_contract.errors import Refusal
from remora_contract.release import Constraints
from remora_contract.targets import MODEL_GROUPS, Projection
from remora_contract.versions import version_numbers


def adapter_refusals(bundle: Bundle, adapter: Adapter) -> list[Refusal]:
    """Empty when the adapter can be resident in an engine of the bundle."""
    refusals = []
    if adapter.base_digest != bundle.base_digest:
        refusals.append(
            Refusal(
                "adapter_base",
                f"base {short(bundle.base_digest)}",
                f"base {short(adapter.base_digest)}",
            )
        )
    if adapter.rank > bundle.graph.max_bank_rank:
        refusals.append(
            Refusal("adapter_rank", f"rank <= {bundle.graph.max_bank_rank}", f"rank {adapter.rank}")
        )
    deepest = max(t.layer for t in adapter.targets)
    if deepest >= bundle.decoder.layers:
        refusals.append(
            Refusal("adapter_layer", f"layer < {bundle.decoder.layers}", f"layer {deepest}")
        )
    refusals += target_refusals(bundle, adapter.targets)
    highest = max(adapter.invocation_tokens, default=0)
    if highest >= bundle.decoder.vocab:
        refusals.append(
            Refusal("adapter_tokens", f"tokens < {bundle.decoder.vocab}", f"token {highest}")
        )
    return refusals


def target_refusals(bundle: Bundle, targets: Iterable[TargetRank]) -> list[Refusal]:
    """What of the targets the bundle's decoder or graph has no place for, each reason once."""
    decoder, graph = bundle.decoder, bundle.graph
    found: dict[str, Refusal] = {}
    for t in targets:
        feature = _feature(t.projection)
        if feature is not None and feature not in graph.adapt:
            found[f"adapter_{feature}"] = feature_refusal(
                f"adapter_{feature}", f"--adapt {feature}"
            )
        if t.dora and not graph.dora:
            found["adapter_dora"] = feature_refusal("adapter_dora", "--dora")
        if t.bias and not graph.adapter_bias:
            found["adapter_bias"] = feature_refusal("adapter_bias", "--adapter-bias")
        inside = t.projection not in MODEL_GROUPS and t.layer < decoder.layers
        if inside and t.projection not in decoder.projections(t.layer):
            found["adapter_projection"] = Refusal(
                "adapter_projection", "a projection that the base has", t.target.name()
            )
        if t.projection.startswith("expert_") and (t.dora or t.bias):
            found["adapter_expert"] = Refusal(
                "adapter_expert", "plain factors on experts", f"DoRA or a bias on {t.target.name()}"
            )
    return list(found.values())


def _feature(projection: Projection) -> str | None:
    """The `--adapt` without which a graph has no inputs for the projection."""
    if projection.startswith("expert_"):
        return "experts"
    return projection if projection in MODEL_GROUPS else None


def feature_refusal(code: str, option: str) -> Refusal:
    """The graph lacks inputs that exporting with `option` would give it."""
    return Refusal(code, f"a bundle that remora-build exported with {option}", "one without")


def constraint_refusals(
    wants: Constraints,
    *,
    memory_bytes: int,
    disk_free_bytes: int,
    agent_version: str,
    backends: Mapping[str, str],
    engine_key: Mapping[str, str],
) -> list[Refusal]:
    """What of a release's constraints a device does not meet. The controller asks before it ships,
    the device before it fetches. `backends` has their versions, `engine_key` the fields of the
    engines that fit (`remora_contract.engine`); 0 bytes of free disk mean that it did not say."""
    refusals = []
    if wants.min_memory_bytes is not None and memory_bytes < wants.min_memory_bytes:
        refusals.append(Refusal("memory", _mib(wants.min_memory_bytes), _mib(memory_bytes)))
    disk = wants.min_disk_free_bytes
    if disk is not None and 0 < disk_free_bytes < disk:
        refusals.append(Refusal("disk", f"{_mib(disk)} free", _mib(disk_free_bytes)))
    need = wants.min_agent_version
    if need is not None and version_numbers(agent_version) < version_numbers(need):
        refusals.append(Refusal("agent_version", f">= {need}", agent_version or "unknown"))
    if wants.backends and not set(wants.backends) & set(backends):
        have = ", ".join(sorted(backends)) or "none"
        refusals.append(Refusal("backend", " or ".join(wants.backends), have))
    sm = engine_key.get(PROCESSORS)
    if wants.sm is not None and sm not in [str(wanted) for wanted in wants.sm]:
        need = " or ".join(f"SM {wanted}" for wanted in wants.sm)
        have = "no GPU that its agent serves with" if sm is None else f"SM {sm}"
        refusals.append(Refusal("sm", need, have))
    return [*refusals, *_version_refusals(wants.min_backend_versions or {}, backends)]


def _version_refusals(wants: Mapping[str, str], backends: Mapping[str, str]) -> list[Refusal]:
    """One backend that is new enough will do: a device runs with one of them."""
    have = {name: backends[name] for name in sorted(wants) if name in backends}
    if not wants or any(version_numbers(v) >= version_numbers(wants[n]) for n, v in have.items()):
        return []
    need = " or ".join(f"{name} >= {version}" for name, version in sorted(wants.items()))
    shown = ", ".join(f"{name} {version or 'unknown'}" for name, version in have.items())
    return [Refusal("backend_version", need, shown or "none of them")]


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
