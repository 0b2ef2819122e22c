"""May this adapter go on that bundle, that release on this device? Pure; all refusals at once."""

from __future__ import annotations

from collections.abc import Collection

from remora_contract.adapter import Adapter
from remora_contract.bundle import Bundle
from remora_contract.digests import short
from remora_contract.errors import Refusal
from remora_contract.release import Constraints
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
    return refusals


def constraint_refusals(
    wants: Constraints, *, memory_bytes: int, agent_version: str, backends: Collection[str]
) -> list[Refusal]:
    """What of a release's constraints a device does not meet. The controller asks before it ships,
    the device before it fetches."""
    refusals = []
    if wants.min_memory_bytes is not None and memory_bytes < wants.min_memory_bytes:
        refusals.append(Refusal("memory", _mib(wants.min_memory_bytes), _mib(memory_bytes)))
    need = wants.min_agent_version
    if need is not None and version_numbers(agent_version) < version_numbers(need):
        refusals.append(Refusal("agent_version", f">= {need}", agent_version or "unknown"))
    if wants.backends and not set(wants.backends) & set(backends):
        have = ", ".join(sorted(backends)) or "none"
        refusals.append(Refusal("backend", " or ".join(wants.backends), have))
    return refusals


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
