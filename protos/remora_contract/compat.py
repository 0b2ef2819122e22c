"""May this adapter go on that bundle? Pure checks that answer with all refusals at once."""

from __future__ import annotations

from remora_contract.adapter import Adapter
from remora_contract.bundle import Bundle
from remora_contract.digests import short
from remora_contract.errors import Refusal


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
