"""The cache of keys and values on the device: one allocation per layer and kind, past and present.

    past_key.{l}, past_value.{l}   [rows, kv_heads, C, head_dim] dtype

The row at slot i begins at base + i * row_bytes, so a row or the first slots are bound without
moving anything. Rows begin at the slots of their own numbers and may change places. Knows how long
each row is; knows no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.protocol import KvBlock
from remora_agent.engine.trt.cuda import Cuda, Direction
from remora_agent.engine.trt.memory import Memory
from remora_contract import targets
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import RemoraError, RequestInvalid, Unsupported
from remora_contract.trt_memory import ALIGNMENT, STAGED_BYTES


@dataclass(frozen=True)
class KvShape:
    rows: int
    layers: int
    heads: int
    capacity: int  # C, of the graph
    dim: int
    dtype: np.dtype[Any]

    @property
    def position_bytes(self) -> int:
        return self.dim * self.dtype.itemsize

    @property
    def head_bytes(self) -> int:
        return self.capacity * self.position_bytes

    @property
    def row_bytes(self) -> int:
        return self.heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.heads * self.position_bytes

    @staticmethod
    def of(decoder: DecoderSpec, rows: int, capacity: int, dtype: np.dtype[Any]) -> KvShape:
        """Raises Unsupported where a row's slice could not be bound."""
        shape = KvShape(rows, decoder.layers, decoder.kv_heads, capacity, decoder.head_dim, dtype)
        if shape.row_bytes % ALIGNMENT:
            raise Unsupported(
                f"a row's cache of {shape.row_bytes} bytes is no multiple of {ALIGNMENT}, where "
                "TensorRT takes an address; export with a --max-context that is a multiple of 128"
            )
        return shape


class KvCache:
    def __init__(
        self, cuda: Cuda, memory: Memory, shape: KvShape, context: int, *, moves: bool = False
    ) -> None:
        """`moves`: with room for rows to change places. Raises Exhausted."""
        self._cuda = cuda
        self.shape = shape
        self.context = context
        self.lengths = np.zeros(shape.rows, np.int64)  # tokens each row holds
        self.slots = list(range(shape.rows))  # of each row
        self.rows = list(range(shape.rows))  # at each slot
        size = shape.rows * shape.row_bytes
        self._bases = {
            name: memory.device(size, f"the cache {name}")
            for layer in range(shape.layers)
            for name in (targets.past_key(layer), targets.past_value(layer))
        }
        self._piece = max(1, min(context, STAGED_BYTES // shape.token_bytes))  # tokens
        self._block = memory.pinned(self._piece * shape.token_bytes, "copies of the cache")
        # The last position of each row, while the row is full and computed beside others.
        self._saved = memory.device(shape.rows * shape.token_bytes, "rows that are full")
        self._aside = memory.device(shape.row_bytes, "a row that moves") if moves else None

    def clear(self, stream: int) -> None:
        """Queues zeros everywhere: attention multiplies masked positions by 0, and 0 * NaN is
        NaN."""
        for base in self._bases.values():
            self._cuda.clear(base, self.shape.rows * self.shape.row_bytes, stream)

    def addresses(self, slot: int) -> dict[str, int]:
        """Where the tensors of a batch that begins at `slot` lie, past and present alike."""
        found = {}
        for past, base in self._bases.items():
            found[past] = found[present_name(past)] = base + slot * self.shape.row_bytes
        return found

    def full_rows(self, count: int) -> list[int]:
        """Rows at the first `count` slots that hold as much as the graph can: for them there is no
        next position."""
        return [r for r in self.rows[:count] if self.lengths[r] == self.shape.capacity]

    def exchange(self, row: int, slot: int, stream: int) -> None:
        """Queues that `row` and the one at `slot` change places, with all that they hold. Raises
        EngineFault; neither then holds anything: some of their layers may have moved."""
        other, own = self.rows[slot], self.slots[row]
        try:
            self._swap(row, own, slot, int(max(self.lengths[row], self.lengths[other])), stream)
        except RemoraError:
            self.lengths[[row, other]] = 0
            raise
        self.slots[row], self.slots[other] = slot, own
        self.rows[own], self.rows[slot] = other, row

    def _swap(self, row: int, own: int, slot: int, tokens: int, stream: int) -> None:
        assert self._aside is not None  # made to move rows
        for base in self._bases.values():
            here, there = (base + s * self.shape.row_bytes for s in (own, slot))
            if self.lengths[row]:
                self._move_row(self._aside, here, tokens, stream)
            self._move_row(here, there, tokens, stream)
            if self.lengths[row]:
                self._move_row(there, self._aside, tokens, stream)

    def _move_row(self, dst: int, src: int, tokens: int, stream: int) -> None:
        """Queues a copy of the first positions of one tensor's row."""
        pitch, width = self.shape.head_bytes, tokens * self.shape.position_bytes
        if tokens:
            ends = (dst, pitch), (src, pitch)
            self._cuda.copy_2d(*ends, width, self.shape.heads, "on_device", stream)

    def save_last(self, row: int, stream: int) -> None:
        """Queues a copy of the last position of a full row."""
        self._last(row, stream, saving=True)

    def restore_last(self, row: int, stream: int) -> None:
        self._last(row, stream, saving=False)

    def _last(self, row: int, stream: int, saving: bool) -> None:
        shape = self.shape
        at = self._saved + row * shape.token_bytes
        for place in self._places(row, shape.capacity - 1):
            saved = (at, shape.position_bytes)
            dst, src = (saved, place) if saving else (place, saved)
            self._cuda.copy_2d(dst, src, shape.position_bytes, shape.heads, "on_device", stream)
            at += shape.heads * shape.position_bytes

    def read(self, row: int, start: int, stop: int, stream: int) -> KvBlock:
        """A copy; see `engine.protocol.Engine.read_kv`. One array [layers * 2, kv_heads, stop -
        start, head_dim]. Waits."""
        parts = []
        for begin in range(start, stop, self._piece):
            count = min(self._piece, stop - begin)
            self._move(row, begin, count, "to_host", stream)
            self._cuda.synchronize(stream)
            parts.append(self._host(count).copy())
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)
        return KvBlock(stop - start, (whole,))

    def write(self, row: int, start: int, block: KvBlock, stream: int) -> None:
        """See `engine.protocol.Engine.write_kv`. Waits."""
        stop = start + block.tokens
        (array,) = block.arrays
        wanted = (2 * self.shape.layers, self.shape.heads, block.tokens, self.shape.dim)
        if array.shape != wanted or array.dtype != self.shape.dtype:
            raise RequestInvalid(f"a block {array.shape} of another engine, not {wanted}")
        for begin in range(0, block.tokens, self._piece):
            count = min(self._piece, block.tokens - begin)
            self._host(count)[...] = array[:, :, begin : begin + count]
            self._move(row, start + begin, count, "to_device", stream)
            self._cuda.synchronize(stream)
        self.lengths[row] = stop

    def _host(self, tokens: int) -> NDArray[Any]:
        shape = self.shape
        return self._block.array((2 * shape.layers, shape.heads, tokens, shape.dim), shape.dtype)

    def _move(self, row: int, start: int, tokens: int, way: Direction, stream: int) -> None:
        shape = self.shape
        width = tokens * shape.position_bytes
        at = self._block.address
        for place in self._places(row, start):
            host = (at, width)
            dst, src = (host, place) if way == "to_host" else (place, host)
            self._cuda.copy_2d(dst, src, width, shape.heads, way, stream)
            at += shape.heads * width

    def _places(self, row: int, position: int) -> Iterator[tuple[int, int]]:
        """(address, pitch from head to head) of a position of a row, for each layer and kind."""
        shape = self.shape
        offset = self.slots[row] * shape.row_bytes + position * shape.position_bytes
        for base in self._bases.values():
            yield base + offset, shape.head_bytes


def present_name(past: str) -> str:
    return past.replace("past_", "present_", 1)
