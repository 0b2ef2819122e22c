"""What an engine takes on the device, before it is there. Pure; bytes.

A bank's group of p parts has T_max = max_bank_rank * p columns in A and in B, each as wide as all
parts together: more than the adapters' own numbers, since B is block-diagonal. Experts have one of
each for every expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from remora_agent.engine.memory_plan import MemoryPlan, Shape, plan_refusals
from remora_agent.engine.trt import bank, kv
from remora_agent.engine.trt.cuda import ALIGNMENT
from remora_agent.engine.trt.factors import factor_shape, neutral_width, places, vector_inputs
from remora_agent.engine.trt.positions import most_logits
from remora_agent.engine.trt.profiles import PREFILL_TOKENS
from remora_agent.engine.trt.sampling import SHORTLIST, WATCHED, SamplingSize
from remora_contract.bundle import Bundle, GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import Exhausted, Refusal
from remora_contract.targets import PARTS

FLOOR_BYTES = 512 << 20  # left to the rest of the system, whatever is served
LEAST_WORKSPACE_BYTES = 64 << 20
MOST_WORKSPACE_BYTES = 2 << 30
_FLOAT32, _INT64 = 4, 8
_INDICES = 5  # tensors of a step that are no gates, each at most one entry a token


def cache_bytes(decoder: DecoderSpec, graph: GraphSpec, rows: int) -> int:
    """The graph's whole capacity, however few tokens of it are offered."""
    tokens = rows * graph.context * 2 * decoder.layers
    return tokens * decoder.kv_heads * decoder.head_dim * _item(graph)


def bank_bytes(decoder: DecoderSpec, graph: GraphSpec) -> int:
    """A and B of every layer and group, and room to lay out the largest anew."""
    factors, layout = 0, 0
    for columns, copies, k, n in _groups(decoder, graph):
        factors += copies * columns * (k + n)
        # One expert's B begins where the one before it ends.
        layout = max(layout, copies * columns * (k if copies == 1 else max(k, n)))
    return (factors + layout) * _item(graph)


def vectors_bytes(decoder: DecoderSpec, graph: GraphSpec, rows: int) -> int:
    """DoRA's factors and biases of each row of a step and of a prompt's, and ones for rows without.
    They do not grow with the bank's rank."""
    inputs = vector_inputs(decoder, graph)
    numbers = (rows + 1) * sum(v.width for v in inputs) + neutral_width(inputs)
    return numbers * _item(graph)


def outputs_bytes(decoder: DecoderSpec, rows: int, chunk: int) -> int:
    """Of a prompt's step of `chunk` tokens: its logits, and states, which decode steps have too."""
    logits = most_logits(decoder.vocab, chunk) * decoder.vocab
    return _FLOAT32 * (logits + max(chunk, rows) * decoder.hidden)


def pinned_bytes(
    decoder: DecoderSpec,
    graph: GraphSpec,
    rows: int,
    chunk: int,
    size: SamplingSize | None = None,
    *,
    overlaps: bool = False,
) -> int:
    """Host memory that the device reads and writes: a step's answer and inputs, shortlists, and
    through which the cache's blocks and adapters travel."""
    size = size or SamplingSize(decoder.vocab, min(SHORTLIST, decoder.vocab), WATCHED)
    chunk = min(chunk, graph.context)
    step = _FLOAT32 * rows * decoder.vocab
    prompt = _FLOAT32 * max(
        most_logits(decoder.vocab, chunk) * decoder.vocab, chunk * decoder.hidden
    )
    answer = step + prompt if overlaps else max(step, prompt)
    token = cache_bytes(decoder, replace(graph, context=1), 1)
    blocks = min(max(token, kv.STAGED_BYTES), graph.context * token)
    widest = max((max(t, n) for t, _, _, n in _groups(decoder, graph)), default=0)
    staged = max(bank.STAGED_BYTES, widest * _item(graph))
    return answer + blocks + staged + size.pinned_bytes(rows) + _inputs(decoder, graph, rows, chunk)


def overlap_bytes(
    decoder: DecoderSpec, graph: GraphSpec, rows: int, chunk: int, scratch: int
) -> int:
    """What a prompt's chunk beside decode steps takes more: scratch memory of its own, states of
    both, and room for a row of one layer's keys or values that changes places."""
    states = _FLOAT32 * min(rows, min(chunk, graph.context)) * decoder.hidden
    row = graph.context * decoder.kv_heads * decoder.head_dim * _item(graph)
    return scratch + states + row


def _inputs(decoder: DecoderSpec, graph: GraphSpec, rows: int, chunk: int) -> int:
    """Of decode steps and of a prompt's: tokens, positions, indices, gates; each rounded up."""
    gates = {group: graph.max_bank_rank * len(PARTS[group]) for _, group in places(decoder, graph)}
    columns = sum(gates.values()) * _item(graph)
    tensors = _INDICES + len(gates)
    steps = rows * (_INDICES * _INT64 + columns)
    prompt = _INDICES * _INT64 * chunk + columns
    return steps + prompt + 2 * tensors * ALIGNMENT


def memory_plan(
    bundle: Bundle,
    rows: int,
    weights: int,
    workspace: int,
    chunk: int = PREFILL_TOKENS,
    pinned: int = 0,
    overlap: int = 0,
) -> MemoryPlan:
    """`workspace`: what layers take while they run, as the builder or the engine said; `chunk`:
    tokens of a prompt's step; `pinned`: of `pinned_bytes`, where that is the GPU's memory too;
    `overlap`: of `overlap_bytes`, where prompts are read beside decode steps."""
    decoder, graph = bundle.decoder, bundle.graph
    return MemoryPlan(
        weights=weights,
        kv=cache_bytes(decoder, graph, rows),
        bank=bank_bytes(decoder, graph),
        workspace=workspace,
        logits=rows * decoder.vocab * _FLOAT32,
        floor=FLOOR_BYTES,
        overlap=overlap,
        pinned=pinned,
        step=outputs_bytes(decoder, rows, min(chunk, graph.context))
        + vectors_bytes(decoder, graph, rows),
    )


def build_plan(
    bundle: Bundle, rows: int, weights: int, device: int, chunk: int, pinned: int
) -> MemoryPlan:
    """Of an engine that is to be built for a GPU of `device` bytes: its `workspace` is the most
    that the builder may give one layer, half of what all other parts leave, within bounds; the
    other half is for activations, which nobody knows before the build. Raises Exhausted naming
    every part when not even the least would be free."""
    plan = memory_plan(bundle, rows, weights, 0, chunk, pinned)
    least = replace(plan, workspace=2 * LEAST_WORKSPACE_BYTES)
    if refused := refusals(least, bundle, rows, device):
        raise Exhausted(str(refused[0]))
    return replace(plan, workspace=min((device - plan.total) // 2, MOST_WORKSPACE_BYTES))


def refusals(plan: MemoryPlan, bundle: Bundle, rows: int, free: int) -> list[Refusal]:
    graph = bundle.graph
    return plan_refusals(plan, Shape(rows, graph.context, graph.max_bank_rank), free)


def _groups(decoder: DecoderSpec, graph: GraphSpec) -> Iterator[tuple[int, int, int, int]]:
    """(columns, copies, k, n) of each layer and group."""
    for _, group in places(decoder, graph):
        yield graph.max_bank_rank * len(PARTS[group]), *factor_shape(decoder, group)


def _item(graph: GraphSpec) -> int:
    return np.dtype(graph.dtype).itemsize
