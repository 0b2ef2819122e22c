"""What an engine of a published bundle takes of memory on a device, and whether it can serve there
at all. Pure: the controller asks for its plan and the device when it admits a release, both of the
same manifest, so they say the same.

Not known of engines of TensorRT Edge-LLM, of a device that does not tell its GPU's memory, and of a
bundle that was published before its manifest said so: neither shown nor refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from remora_contract.bundle import Bundle
from remora_contract.engine_memory import (
    bank_bytes,
    engine_bytes,
    int8_prefill_bytes,
    kv_bytes,
    row_slot_bytes,
)
from remora_contract.errors import Refusal
from remora_contract.memory_plan import MemoryPlan
from remora_contract.trt_memory import (
    PREFILL_TOKENS,
    GpuMemory,
    TrtSizes,
    build_plan,
    least_plan,
)

MAX_ROWS = 256  # of any engine
FACT = "onnxruntime_memory"
BACKEND = "onnxruntime"
TENSORRT_FACT = "tensorrt_memory"
TENSORRT_BACKENDS = ("tensorrt", "tensorrt_rtx")
# Of these the builder is given a workspace by the GPU's memory; of others no limit is set.
_BOUND_BACKENDS = ("tensorrt",)
_FIELDS = ("weights", "int8_prefill", "kv_token", "bank", "row_slot")


@dataclass(frozen=True)
class Sizing:
    """How a device's agent opens engines. `context` None: as the bundle was exported."""

    backend: str
    rows: int
    context: int | None
    floor_bytes: int  # stays free
    prefill: str  # plain, int8, auto (int8 where it fits)
    gpu: GpuMemory | None = None  # None: it has none, or does not say


def memory_facts(bundle: Bundle) -> dict[str, dict[str, int]]:
    """For the bundle's manifest, by name. An engine folder of TensorRT Edge-LLM has none of
    TensorRT's: nothing is built of it."""
    told = {FACT: _onnxruntime_fact(bundle)}
    if bundle.graph.dialect != "edgellm":
        told[TENSORRT_FACT] = asdict(TrtSizes.of(bundle))
    return told


def _onnxruntime_fact(bundle: Bundle) -> dict[str, int]:
    decoder, graph = bundle.decoder, bundle.graph
    rank = graph.max_bank_rank
    return {
        "weights": engine_bytes(decoder, graph),
        "int8_prefill": int8_prefill_bytes(decoder),
        "kv_token": kv_bytes(decoder, rows=1, context=0),
        "bank": bank_bytes(decoder, rank, graph=graph),
        "row_slot": row_slot_bytes(decoder, 1, rank),
    }


def peak_memory_bytes(
    facts: Mapping[str, Any], sizing: Sizing | None, memory_bytes: int
) -> int | None:
    """With every row in use and full, the floor included; of the GPU, where engines take its
    memory. None: not known."""
    found = _tensorrt(facts, sizing)
    if found is not None:
        return found.peak_bytes
    sizes = _sizes(facts, sizing)
    if sizing is None or sizes is None:
        return None
    plain = (
        sizes["weights"]
        + sizes["bank"]
        + sizing.rows * (_row_bytes(facts, sizes, sizing) + sizes["row_slot"])
        + sizing.floor_bytes
    )
    whole = plain + sizes["int8_prefill"]
    takes_int8 = sizing.prefill == "int8" or (sizing.prefill == "auto" and whole <= memory_bytes)
    return whole if takes_int8 else plain


def memory_need_refusals(
    facts: Mapping[str, Any], sizing: Sizing | None, memory_bytes: int
) -> list[Refusal]:
    """Of a device that could not serve it, whatever else it stops: with ONNX Runtime a single row,
    with TensorRT all its rows, whose cache an engine takes when it is loaded."""
    found = _tensorrt(facts, sizing)
    if found is not None:
        return found.sizes.refusals(found.least, found.rows, found.gpu.bytes)
    sizes = _sizes(facts, sizing)
    if sizing is None or sizes is None or not memory_bytes:
        return []
    weights = sizes["weights"] + (sizes["int8_prefill"] if sizing.prefill == "int8" else 0)
    row = _row_bytes(facts, sizes, sizing)
    need = weights + row + sizing.floor_bytes
    if need <= memory_bytes:
        return []
    parts = f"weights {_mib(weights)}, one row {_mib(row)}, floor {_mib(sizing.floor_bytes)}"
    advice = "a smaller context, or quantized weights"
    return [Refusal("memory", f"{_mib(need)} ({parts}; {advice})", _mib(memory_bytes))]


@dataclass(frozen=True)
class _TensorRT:
    """Of an engine that is not built yet."""

    sizes: TrtSizes
    rows: int
    chunk: int
    gpu: GpuMemory
    is_bound: bool

    @property
    def least(self) -> MemoryPlan:
        return least_plan(self.sizes, self.rows, self.chunk, self.gpu)

    @property
    def peak_bytes(self) -> int:
        least = self.least
        if not self.is_bound or least.total > self.gpu.bytes:
            return least.total
        return build_plan(self.sizes, self.rows, self.chunk, self.gpu).total


def _tensorrt(facts: Mapping[str, Any], sizing: Sizing | None) -> _TensorRT | None:
    """None for another backend, and where something is not told."""
    if sizing is None or sizing.backend not in TENSORRT_BACKENDS or sizing.gpu is None:
        return None
    sizes = TrtSizes.read(facts.get(TENSORRT_FACT))
    if sizes is None:
        return None
    chunk = min(PREFILL_TOKENS, sizing.context or sizes.context)
    is_bound = sizing.backend in _BOUND_BACKENDS
    return _TensorRT(sizes, sizing.rows, chunk, sizing.gpu, is_bound)


def _row_bytes(facts: Mapping[str, Any], sizes: Mapping[str, int], sizing: Sizing) -> int:
    most = facts.get("context")
    context = most if isinstance(most, int) else 0
    if sizing.context is not None:
        context = min(context, sizing.context)
    return sizes["kv_token"] * (context + 1)


def _sizes(facts: Mapping[str, Any], sizing: Sizing | None) -> dict[str, int] | None:
    """None for another backend, and for a bundle that was published before this was told."""
    told = facts.get(FACT)
    if sizing is None or sizing.backend != BACKEND or not isinstance(told, Mapping):
        return None
    found = {name: told.get(name) for name in _FIELDS}
    if not all(isinstance(size, int) and size >= 0 for size in found.values()):
        return None
    return {name: size for name, size in found.items() if isinstance(size, int)}


def _mib(count: int) -> str:
    return f"{-(-count // (1 << 20))} MiB"
