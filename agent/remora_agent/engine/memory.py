"""Will it fit? Estimates in bytes and a pure check against what is available. Reads nothing.

Memory on a Jetson is shared with the rest of the system, so the floor that stays free is a part
of the plan and not an afterthought.
"""

from __future__ import annotations

from remora_contract.bundle import DecoderSpec, GraphSpec
from remora_contract.errors import Refusal

_FLOAT32 = 4


def fits(
    engine_bytes: int, kv_bytes: int, bank_bytes: int, floor_bytes: int, available_bytes: int
) -> list[Refusal]:
    """Empty when engine, cache and bank leave `floor_bytes` of `available_bytes` free."""
    need = engine_bytes + kv_bytes + bank_bytes + floor_bytes
    if need <= available_bytes:
        return []
    parts = (
        f"{need} bytes (engine {engine_bytes}, cache {kv_bytes}, adapters {bank_bytes}, "
        f"kept free {floor_bytes})"
    )
    return [Refusal("memory", parts, f"{available_bytes} bytes")]


def engine_bytes(decoder: DecoderSpec, graph: GraphSpec) -> int:
    """Weights a loaded engine keeps in memory: float32, or int4 with float32 scales.

    The embedding table is mapped and read row by row, so it counts only where the head needs it.
    """
    weights = decoder.hidden * decoder.vocab
    for layer in range(decoder.layers):
        for p in decoder.projections(layer):
            copies = decoder.copies(p)
            weights += copies * decoder.in_features(p) * decoder.out_features(p)
    if graph.quant.block is None:
        return weights * _FLOAT32
    return weights // 2 + weights // graph.quant.block * _FLOAT32


def kv_bytes(decoder: DecoderSpec, rows: int, context: int, element_bytes: int = _FLOAT32) -> int:
    """Keys and values of all layers, [rows, kv_heads, context + 1, head_dim] each.

    The pages of unused positions are taken lazily: this is the most it grows to.
    """
    per_token = decoder.layers * 2 * decoder.kv_heads * decoder.head_dim
    return rows * (context + 1) * per_token * element_bytes


def bank_bytes(decoder: DecoderSpec, rank: int, element_bytes: int = _FLOAT32) -> int:
    """Adapters of `rank` columns in all, on every projection of every layer."""
    per_rank = sum(
        decoder.copies(p) * (decoder.in_features(p) + decoder.out_features(p))
        for layer in range(decoder.layers)
        for p in decoder.projections(layer)
    )
    return per_rank * rank * element_bytes


def row_slot_bytes(decoder: DecoderSpec, rows: int, rank: int) -> int:
    """What a batch with different adapters per row takes besides: one copy of a mix per row."""
    return rows * bank_bytes(decoder, rank)
