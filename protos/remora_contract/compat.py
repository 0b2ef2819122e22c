"""May this adapter go on that bundle, that release on this device? Pure; all refusals at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from remora_contract.adapter import Adapter, TargetRank
from remora_contract.bundle import Bundle
from remora_contract.digests import short
from remora_contract.errors import Refusal
from remora_contract.targets import MODEL_GROUPS, Projection
from remora_contract.versions import is_in_range, version_numbers

if TYPE_CHECKING:  # those who ask of adapters alone need not import it
    from remora_contract.release import Constraints

_UNKNOWN = "unknown: the device does not say"


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


def quant_refusals(wanted: str | None, stored: object) -> list[Refusal]:
    """Where a release says how its bundle's weights are stored, they are."""
    if wanted is None or wanted == stored:
        return []
    return [Refusal("quant", f"a bundle of {wanted} weights", f"one of {stored}")]


def constraint_refusals(
    wants: Constraints,
    *,
    memory_bytes: int,
    disk_free_bytes: int | None,
    agent_version: str,
    backends: Mapping[str, str],
    engine_key: Mapping[str, str],
) -> list[Refusal]:
    """What of a release's constraints a device does not meet, or did not tell: compatibility, then
    disk, then memory. The controller asks before it ships, the device before it fetches. `backends`
    has their versions, `engine_key` the fields of the engines that fit (`remora_contract.engine`);
    0 bytes, as "" for a version, mean that the device did not say. `disk_free_bytes` None: nothing
    has to be fetched."""
    from remora_contract.engine import PROCESSORS

    refusals = [
        *_agent_refusals(wants, agent_version),
        *_backend_refusals(wants, backends),
        *_sm_refusals(wants, engine_key.get(PROCESSORS)),
    ]
    disk = wants.min_disk_free_bytes
    if disk is not None and disk_free_bytes is not None and disk_free_bytes < disk:
        refusals.append(Refusal("disk", f"{_mib(disk)} free", _mib(disk_free_bytes)))
    if wants.min_memory_bytes is not None and memory_bytes < wants.min_memory_bytes:
        refusals.append(Refusal("memory", _mib(wants.min_memory_bytes), _mib(memory_bytes)))
    return refusals


def _agent_refusals(wants: Constraints, have: str) -> Iterator[Refusal]:
    need = wants.min_agent_version
    if need is not None and version_numbers(have) < version_numbers(need):
        yield Refusal("agent_version", f">= {need}", have or _UNKNOWN)
    versions = wants.agent_version
    if versions is not None and not is_in_range(have, versions):
        yield Refusal("agent_version", versions, have or _UNKNOWN)


def _backend_refusals(wants: Constraints, backends: Mapping[str, str]) -> Iterator[Refusal]:
    if wants.backends and not set(wants.backends) & set(backends):
        have = ", ".join(sorted(backends)) or "none"
        yield Refusal("backend", " or ".join(wants.backends), have)
    yield from _version_refusals(wants.min_backend_versions or {}, backends, ">= ", _is_new_enough)
    yield from _version_refusals(wants.backend_versions or {}, backends, "", is_in_range)


def _sm_refusals(wants: Constraints, sm: str | None) -> Iterator[Refusal]:
    if wants.sm is not None and sm not in [str(wanted) for wanted in wants.sm]:
        need = " or ".join(f"SM {wanted}" for wanted in wants.sm)
        have = "no GPU that its agent serves with" if sm is None else f"SM {sm}"
        yield Refusal("sm", need, have)


def _is_new_enough(have: str, need: str) -> bool:
    return version_numbers(have) >= version_numbers(need)


def _version_refusals(
    wants: Mapping[str, str],
    backends: Mapping[str, str],
    sign: str,
    fits: Callable[[str, str], bool | None],
) -> Iterator[Refusal]:
    """One backend that fits will do: a device runs with one of them."""
    have = {name: backends[name] for name in sorted(wants) if name in backends}
    if not wants or any(fits(version, wants[name]) for name, version in have.items()):
        return
    need = " or ".join(f"{name} {sign}{version}" for name, version in sorted(wants.items()))
    shown = ", ".join(f"{name} {version or 'unknown'}" for name, version in have.items())
    yield Refusal("backend_version", need, shown or "none of them")


def _mib(count: int) -> str:
    """0 is how a device says nothing."""
    return f"{count / (1 << 20):.0f} MiB" if count else _UNKNOWN
