"""How much one layer may take while it runs, from what the device has and the model needs. Pure."""

from __future__ import annotations

from remora_agent.engine.trt.sizes import FLOOR_BYTES
from remora_contract.errors import Exhausted

LEAST_BYTES = 64 << 20
MOST_BYTES = 2 << 30


def workspace_bytes(device: int, weights: int, kv: int, bank: int) -> int:
    """Half of what stays free of `device` bytes, within bounds: the other half is activations.

    Raises Exhausted naming every part when not even the least would be free.
    """
    free = device - weights - kv - bank - FLOOR_BYTES
    if free < 2 * LEAST_BYTES:
        parts = (
            f"weights {weights >> 20}, cache {kv >> 20}, adapters {bank >> 20}, "
            f"kept free {FLOOR_BYTES >> 20}, workspace {2 * LEAST_BYTES >> 20}"
        )
        raise Exhausted(
            f"the GPU has {device >> 20} MiB and the engine needs more ({parts} MiB): serve fewer "
            "rows, or export with a smaller --max-context, --max-bank-rank or int4 weights"
        )
    return min(free // 2, MOST_BYTES)
