"""The sampling graph on the device: what it reads and leaves, and the one small copy back.

Its context is enqueued behind the decode graph's, on the same stream and in the same CUDA graph; it
reads the logits where that left them. What a row watches is uploaded, and read back, only in steps
in which a row watches something.

    in    watched_ids [rows, W] int64    temperature [rows, 1] float32
    out   ids, top_logits [rows, K]    tail, tail_at [rows, 1]    watched [rows, W]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import Shortlist, Watch
from remora_agent.engine.trt.contexts import Context, Plan
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.memory import Memory
from remora_agent.engine.trt.sampling_graph import INPUTS, OUTPUTS
from remora_contract.errors import ArtifactInvalid
from remora_contract.trt_memory import SamplingSize, aligned

PLAN = "sampling.plan"  # in the engine's folder; absent: the engine makes no shortlists
FACT_SHORTLIST = "shortlist"  # tokens a row
FACT_WATCHED = "watched"  # further tokens a row
_WATCHED_IDS, _TEMPERATURE = "watched_ids", "temperature"


def written(size: SamplingSize) -> dict[str, str]:
    """As EngineManifest keeps it."""
    return {FACT_SHORTLIST: str(size.shortlist), FACT_WATCHED: str(size.watched)}


def size_of(facts: Mapping[str, str], vocab: int, where: str) -> SamplingSize | None:
    """None where the engine was built without. Raises ArtifactInvalid."""
    if FACT_SHORTLIST not in facts:
        return None
    try:
        size = SamplingSize(vocab, int(facts[FACT_SHORTLIST]), int(facts[FACT_WATCHED]))
    except (KeyError, ValueError) as e:
        raise ArtifactInvalid(f"{where}: facts of no sampling graph ({e}); build it again") from e
    if not (1 <= size.shortlist <= vocab and size.watched >= 1):
        raise ArtifactInvalid(f"{where}: a shortlist of {size.shortlist} tokens; build it again")
    return size


def check_plan(plan: Plan, size: SamplingSize, rows: int) -> None:
    """Raises ArtifactInvalid when the plan is no sampling graph of this size."""
    if plan.inputs != set(INPUTS) or plan.outputs != set(OUTPUTS):
        raise ArtifactInvalid(f"{PLAN} has other tensors than a sampling graph; build it again")
    logits, watched = plan.most("logits", 0), plan.most(_WATCHED_IDS, 0)
    if logits[0] < rows or logits[1] != size.vocab or watched != (logits[0], size.watched):
        raise ArtifactInvalid(
            f"{PLAN} takes {list(logits)} logits and {list(watched)} watched tokens; build it again"
        )
    if plan.dtype("ids") != np.int32 or plan.dtype("logits") != np.float32:
        raise ArtifactInvalid(f"{PLAN} has tensors of other types; build it again")


class Sampling:
    """Driven by the engine's thread; a step must have run before the next is written."""

    def __init__(
        self, cuda: Cuda, memory: Memory, size: SamplingSize, rows: int, logits: int
    ) -> None:
        """`logits` is the address of [rows, vocab] float32. Raises Exhausted."""
        self._cuda = cuda
        self._size = size
        self._logits = logits
        ids, temperatures = 8 * rows * size.watched, 4 * rows
        self._ids = memory.device(ids, "watched tokens")
        self._ids_host = memory.pinned(ids, "watched tokens")
        self._temperature = memory.device(temperatures, "temperatures")
        host = memory.pinned(temperatures, "temperatures")
        self._temperatures = host.array((rows,), np.dtype(np.float32))
        self._temperatures[:] = 1
        self._temperature_host = host.address
        block = self._end("watched", rows)
        self._out = memory.device(block, "shortlists")
        self._out_host = memory.pinned(block, "shortlists")
        self._watching = False

    def clear(self, stream: int) -> None:
        """Queues valid ids for rows that never watch anything."""
        self._cuda.clear(self._ids, self._ids_host.size, stream)

    def write(self, watches: Mapping[int, Watch], rows: int, stream: int) -> None:
        """What rows of the batch of `rows` watch; queues the copy of the ids, if there are any."""
        shape = (rows, self._size.watched)
        ids = self._ids_host.array(shape, np.dtype(np.int64))
        self._watching = any(len(watch.ids) for watch in watches.values())
        self._temperatures[:] = 1
        if self._watching:
            ids[...] = 0
        for row, watch in watches.items():
            self._temperatures[row] = watch.temperature
            ids[row, : len(watch.ids)] = watch.ids
        if self._watching:
            size = 8 * rows * self._size.watched
            self._cuda.copy(self._ids, self._ids_host.address, size, "to_device", stream)

    def upload(self, stream: int) -> None:
        """Queues the temperatures' copy: part of the captured step."""
        size = self._temperatures.nbytes
        self._cuda.copy(self._temperature, self._temperature_host, size, "to_device", stream)

    def bind(self, context: Context, rows: int) -> None:
        """Raises EngineFault."""
        shapes = {
            "logits": (rows, self._size.vocab),
            _WATCHED_IDS: (rows, self._size.watched),
            _TEMPERATURE: (rows, 1),
        }
        addresses = {
            "logits": self._logits,
            _WATCHED_IDS: self._ids,
            _TEMPERATURE: self._temperature,
            **{name: self._out + self._place(name, rows) for name in OUTPUTS},
        }
        context.bind(shapes, addresses)

    def read_back(self, rows: int, stream: int) -> None:
        """Queues the one copy."""
        size = self._end("watched" if self._watching else "tail_at", rows)
        self._cuda.copy(self._out_host.address, self._out, size, "to_host", stream)

    def found(self, batch: int, rows: Sequence[int]) -> Shortlist:
        """A copy of what the last step of `batch` rows left for some of them, in their order."""

        def of(name: str, kind: Any = np.float32) -> NDArray[Any]:
            shape = (batch, self._width(name))
            whole = self._out_host.array(shape, np.dtype(kind), self._place(name, batch))
            chosen: NDArray[Any] = whole[list(rows)]
            return chosen

        watched = of("watched") if self._watching else np.zeros((len(rows), 0), np.float32)
        return Shortlist(
            of("ids", np.int32), of("top_logits"), watched, of("tail")[:, 0], of("tail_at")[:, 0]
        )

    def _width(self, name: str) -> int:
        size = self._size
        return {"ids": size.shortlist, "top_logits": size.shortlist, "watched": size.watched}.get(
            name, 1
        )

    def _place(self, name: str, rows: int) -> int:
        """Bytes before a tensor in a step's block; what is watched is the last."""
        at = 0
        for other in ("ids", "top_logits", "tail", "tail_at", "watched"):
            if other == name:
                break
            at += aligned(4 * rows * self._width(other))
        return at

    def _end(self, name: str, rows: int) -> int:
        return self._place(name, rows) + 4 * rows * self._width(name)
