"""What an engine of TensorRT takes on a device, before it is there. Pure; bytes.

`TrtSizes` is all of a bundle that this depends on: a bundle gives it, and so does the manifest that
it is published with, so a controller and a device reckon by the same functions.

A bank's group of p parts has T_max = max_bank_rank * p columns in A and in B, each as wide as all
parts together: more than the adapters' own numbers, since B is block-diagonal. Experts have one of
each for every expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from remora_contract.bank_inputs import factor_shape, neutral_width, places, vector_inputs
from remora_contract.bundle import GRAPH_FILE, Bundle, GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import Exhausted, Refusal
from remora_contract.memory_plan import MemoryPlan, Shape, plan_refusals
from remora_contract.targets import PARTS

FLOOR_BYTES = 512 << 20  # left to the rest of the system, whatever is served
LEAST_WORKSPACE_BYTES = 64 << 20
MOST_WORKSPACE_BYTES = 2 << 30
PREFILL_TOKENS = 256  # of a prompt in one call: what the scheduler reads between two decode steps
STAGED_BYTES = 4 << 20  # pinned memory through which adapters travel, and as much for cache blocks
ALIGNMENT = 256  # of every allocation, and what TensorRT asks of an address
SHORTLIST = 256  # tokens a row
WATCHED = 1024  # further tokens a row: as many as a request may bias
ITEM_BYTES = {"float16": 2, "float32": 4}  # by a graph's dtype
_LOGITS_BYTES = 16 << 20  # of a prompt's logits on the device, at most
_FLOAT32, _INT64 = 4, 8
_INDICES = 5  # tensors of a step that are no gates, each at most one entry a token
_AT_LEAST_ONE = ("context", "layers", "vocab", "hidden")


def aligned(size: int) -> int:
    """`size` rounded up to where another tensor may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def most_logits(vocab: int, chunk: int) -> int:
    """Positions of a step of a prompt of at most `chunk` tokens that get logits."""
    return max(1, min(chunk, _LOGITS_BYTES // (_FLOAT32 * vocab)))


@dataclass(frozen=True)
class GpuMemory:
    bytes: int  # of the device
    is_shared: bool  # with the system, as on a Jetson: `bytes` are the system's too


@dataclass(frozen=True)
class SamplingSize:
    vocab: int
    shortlist: int
    watched: int

    def pinned_bytes(self, rows: int) -> int:
        """What rows watch, their temperatures, and what is read back."""
        block = rows * 4 * (2 * self.shortlist + 2 + self.watched)
        return aligned(8 * rows * self.watched) + aligned(4 * rows) + block + 5 * ALIGNMENT


@dataclass(frozen=True)
class TrtSizes:
    """What of a bundle its engine's memory depends on; bytes, where it is no count."""

    weights: int  # the graph's files: what the engine has of them is known once it is built
    context: int  # tokens of a row's cache, however few of them are offered
    layers: int
    vocab: int
    hidden: int
    bank_rank: int
    cache_token: int  # keys and values of all layers, of one row
    bank: int  # A and B of every layer and group, and room to lay out the largest anew
    longest_factor: int  # the longest line of any A or B, which travels whole
    row_vectors: int  # DoRA's factors and biases of a row; they do not grow with the bank's rank
    neutral_vector: int  # for rows without an adapter
    gates: int  # tensors
    row_gates: int  # of one row, all columns of all of them

    @classmethod
    def of(cls, bundle: Bundle) -> TrtSizes:
        decoder, graph = bundle.decoder, bundle.graph
        item = ITEM_BYTES[graph.dtype]
        vectors = vector_inputs(decoder, graph)
        columns = {g: graph.max_bank_rank * len(PARTS[g]) for _, g in places(decoder, graph)}
        widest = max((max(t, n) for t, _, _, n in _groups(decoder, graph)), default=0)
        return cls(
            weights=sum(f.size for f in bundle.files if f.path.startswith(GRAPH_FILE)),
            context=graph.context,
            layers=decoder.layers,
            vocab=decoder.vocab,
            hidden=decoder.hidden,
            bank_rank=graph.max_bank_rank,
            cache_token=2 * decoder.layers * decoder.kv_heads * decoder.head_dim * item,
            bank=_bank_numbers(decoder, graph) * item,
            longest_factor=widest * item,
            row_vectors=sum(v.width for v in vectors) * item,
            neutral_vector=neutral_width(vectors) * item,
            gates=len(columns),
            row_gates=sum(columns.values()) * item,
        )

    @classmethod
    def read(cls, told: object) -> TrtSizes | None:
        """Of a manifest's fact; None where it is none that this version understands."""
        if not isinstance(told, Mapping):
            return None
        found: dict[str, Any] = {f.name: told.get(f.name) for f in fields(cls)}
        for name, size in found.items():
            if not isinstance(size, int) or size < (name in _AT_LEAST_ONE):
                return None
        return cls(**found)

    def cache_bytes(self, rows: int) -> int:
        return rows * self.context * self.cache_token

    def vectors_bytes(self, rows: int) -> int:
        """DoRA's factors and biases of each row of a step and of a prompt's, and ones for rows
        without."""
        return (rows + 1) * self.row_vectors + self.neutral_vector

    def outputs_bytes(self, rows: int, chunk: int) -> int:
        """Of a prompt's step of `chunk` tokens: its logits, and states, which decode steps have
        too."""
        logits = most_logits(self.vocab, chunk) * self.vocab
        return _FLOAT32 * (logits + max(chunk, rows) * self.hidden)

    def pinned_bytes(
        self, rows: int, chunk: int, size: SamplingSize | None = None, *, overlaps: bool = False
    ) -> int:
        """Host memory that the device reads and writes: a step's answer and inputs, shortlists, and
        through which the cache's blocks and adapters travel."""
        size = size or SamplingSize(self.vocab, min(SHORTLIST, self.vocab), WATCHED)
        chunk = min(chunk, self.context)
        step = _FLOAT32 * rows * self.vocab
        positions = most_logits(self.vocab, chunk)
        prompt = _FLOAT32 * max(positions * self.vocab, chunk * self.hidden)
        answer = step + prompt if overlaps else max(step, prompt)
        blocks = min(max(self.cache_token, STAGED_BYTES), self.context * self.cache_token)
        staged = max(STAGED_BYTES, self.longest_factor)
        return answer + blocks + staged + size.pinned_bytes(rows) + self._inputs(rows, chunk)

    def overlap_bytes(self, rows: int, chunk: int, scratch: int) -> int:
        """What a prompt's chunk beside decode steps takes more: scratch memory of its own, states
        of both, and room for a row of one layer's keys or values that changes places."""
        states = _FLOAT32 * min(rows, min(chunk, self.context)) * self.hidden
        row = self.context * self.cache_token // (2 * self.layers)
        return scratch + states + row

    def _inputs(self, rows: int, chunk: int) -> int:
        """Of decode steps and of a prompt's: tokens, positions, indices, gates; each rounded up."""
        steps = rows * (_INDICES * _INT64 + self.row_gates)
        prompt = _INDICES * _INT64 * chunk + self.row_gates
        return steps + prompt + 2 * (_INDICES + self.gates) * ALIGNMENT

    def memory_plan(
        self,
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
        outputs = self.outputs_bytes(rows, min(chunk, self.context))
        return MemoryPlan(
            weights=weights,
            kv=self.cache_bytes(rows),
            bank=self.bank,
            workspace=workspace,
            logits=rows * self.vocab * _FLOAT32,
            floor=FLOOR_BYTES,
            overlap=overlap,
            pinned=pinned,
            step=outputs + self.vectors_bytes(rows),
        )

    def refusals(self, plan: MemoryPlan, rows: int, free: int) -> list[Refusal]:
        return plan_refusals(plan, Shape(rows, self.context, self.bank_rank), free)


def least_plan(sizes: TrtSizes, rows: int, chunk: int, gpu: GpuMemory) -> MemoryPlan:
    """Of an engine that is not built yet, with the least workspace: no engine of so many rows is
    built for a GPU that is smaller. All rows' cache is taken when it is loaded, so fewer are not
    tried."""
    chunk = min(chunk, sizes.context)
    pinned = sizes.pinned_bytes(rows, chunk) if gpu.is_shared else 0
    return sizes.memory_plan(rows, sizes.weights, 2 * LEAST_WORKSPACE_BYTES, chunk, pinned)


def build_plan(sizes: TrtSizes, rows: int, chunk: int, gpu: GpuMemory) -> MemoryPlan:
    """Of an engine that is to be built for this GPU: its `workspace` is the most that the builder
    may give one layer, half of what all other parts leave, within bounds; the other half is for
    activations, which nobody knows before the build. Raises Exhausted naming every part when not
    even the least would be free."""
    least = least_plan(sizes, rows, chunk, gpu)
    if refused := sizes.refusals(least, rows, gpu.bytes):
        raise Exhausted(str(refused[0]))
    rest = replace(least, workspace=0)
    return replace(rest, workspace=min((gpu.bytes - rest.total) // 2, MOST_WORKSPACE_BYTES))


def _bank_numbers(decoder: DecoderSpec, graph: GraphSpec) -> int:
    factors, layout = 0, 0
    for columns, copies, k, n in _groups(decoder, graph):
        factors += copies * columns * (k + n)
        # One expert's B begins where the one before it ends.
        layout = max(layout, copies * columns * (k if copies == 1 else max(k, n)))
    return factors + layout


def _groups(decoder: DecoderSpec, graph: GraphSpec) -> Iterator[tuple[int, int, int, int]]:
    """(columns, copies, k, n) of each layer and group."""
    for _, group in places(decoder, graph):
        yield graph.max_bank_rank * len(PARTS[group]), *factor_shape(decoder, group)
