"""What an engine of ONNX Runtime takes, in bytes, before it is there. Reads nothing; `memory_plan`
says whether it fits."""

from __future__ import annotations

from remora_contract.bundle import GraphSpec, QuantSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import GROUP_OF, matrix_name

_FLOAT32 = 4
_INTEGER_BITS = {"int4": 4, "int8": 8}
_LEAST_COLUMN_BLOCK = 32  # a column's one scale is repeated for blocks of at least so many


def engine_bytes(decoder: DecoderSpec, graph: GraphSpec) -> int:
    """Weights a loaded engine keeps in memory: integers with float32 scales where the graph has
    them, else float32, into which a processor's engine turns 8-bit and 4-bit floats too.

    The embedding table is mapped and read row by row, so it counts only where the head needs it.
    """
    total = _stored(decoder.hidden * decoder.vocab, graph.quant, "head")
    for layer in range(decoder.layers):
        for p in decoder.projections(layer):
            weights = decoder.copies(p) * decoder.in_features(p) * decoder.out_features(p)
            total += _stored(weights, graph.quant, matrix_name(layer, GROUP_OF[p]))
    return total


def int8_prefill_bytes(decoder: DecoderSpec) -> int:
    """What prompts in int8 take besides: every layer's weights as bytes, packed for the kernels,
    with a float32 scale a column."""
    total = 0
    for layer in range(decoder.layers):
        for p in decoder.projections(layer):
            k, n = decoder.in_features(p), decoder.out_features(p)
            total += decoder.copies(p) * n * (k + _FLOAT32)
    return total


def _stored(weights: int, quant: QuantSpec, matrix: str) -> int:
    if not quant.quantizes(matrix) or quant.kind not in _INTEGER_BITS:
        return weights * _FLOAT32
    scales = weights // (quant.block or _LEAST_COLUMN_BLOCK)
    zeros = scales // 2 if quant.zero_points else 0
    return weights * _INTEGER_BITS[quant.kind] // 8 + scales * _FLOAT32 + zeros


def kv_bytes(decoder: DecoderSpec, rows: int, context: int, element_bytes: int = _FLOAT32) -> int:
    """Keys and values of all layers, [rows, kv_heads, context + 1, head_dim] each.

    The pages of unused positions are taken lazily: this is the most it grows to.
    """
    per_token = decoder.layers * 2 * decoder.kv_heads * decoder.head_dim
    return rows * (context + 1) * per_token * element_bytes


def bank_bytes(
    decoder: DecoderSpec,
    rank: int,
    element_bytes: int = _FLOAT32,
    graph: GraphSpec | None = None,
) -> int:
    """Adapters of `rank` columns in all, on every projection of every layer and on whatever else
    the graph takes; of vectors as many as one adapter has."""
    per_rank, outputs = 0, 0
    for layer in range(decoder.layers):
        for p in decoder.projections(layer):
            k, n = decoder.in_features(p), decoder.out_features(p)
            per_rank += decoder.copies(p) * (k + n)
            outputs += n
    if graph is None:
        return per_rank * rank * element_bytes
    ends = sum(part in graph.adapt for part in ("embed", "head"))
    per_rank += ends * (decoder.hidden + decoder.vocab)
    vectors = (graph.dora + graph.adapter_bias) * outputs
    return (per_rank * rank + vectors) * element_bytes


def row_slot_bytes(decoder: DecoderSpec, rows: int, rank: int) -> int:
    """What a batch with different adapters per row takes besides: one copy of a mix per row."""
    return rows * bank_bytes(decoder, rank)
