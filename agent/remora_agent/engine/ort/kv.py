"""The cache of keys and values: one array per layer and kind, allocated once, read and written in
place by the runtime. Knows how long each row is; knows no tokens.

    keys[l], values[l]   [rows, kv_heads, context + 1, head_dim] float32

Pages are taken from the system when first written. The position after the context belongs to
nobody: a full row that is computed only because it lies between two others writes there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_agent.engine.ort.values import Buffer
from remora_agent.engine.protocol import KvBlock
from remora_contract import targets
from remora_contract.decoder import DecoderSpec


class KvCache:
    def __init__(self, decoder: DecoderSpec, rows: int, context: int) -> None:
        shape = (rows, decoder.kv_heads, context + 1, decoder.head_dim)
        self._arrays: dict[str, NDArray[np.float32]] = {}
        for layer in range(decoder.layers):
            self._arrays[targets.past_key(layer)] = np.zeros(shape, np.float32)
            self._arrays[targets.past_value(layer)] = np.zeros(shape, np.float32)
        self._views: dict[tuple[int, int], dict[str, Buffer]] = {}
        self.lengths = np.zeros(rows, np.int64)  # tokens each row holds
        self.context = context

    def view(self, first: int, count: int) -> dict[str, Buffer]:
        """Input name -> rows first..first+count-1 of the same memory, made once."""
        known = self._views.get((first, count))
        if known is None:
            known = {n: Buffer(a[first : first + count]) for n, a in self._arrays.items()}
            self._views[(first, count)] = known
        return known

    def read(self, row: int, start: int, stop: int) -> KvBlock:
        """A copy; see `engine.protocol.Engine.read_kv`. One array [layers * 2, kv_heads, stop -
        start, head_dim]."""
        return KvBlock(
            stop - start, (np.stack([a[row, :, start:stop] for a in self._arrays.values()]),)
        )

    def write(self, row: int, start: int, block: KvBlock) -> None:
        """See `engine.protocol.Engine.write_kv`."""
        stop = start + block.tokens
        (stacked,) = block.arrays
        for array, part in zip(self._arrays.values(), stacked, strict=True):
            array[row, :, start:stop] = part
        self.lengths[row] = stop

    def clear(self) -> None:
        """Gives the memory back, once no binding holds a view either."""
        self._views.clear()
        self._arrays.clear()


def present_name(past: str) -> str:
    """Output that shares the memory of an input."""
    return past.replace("past_", "present_", 1)
