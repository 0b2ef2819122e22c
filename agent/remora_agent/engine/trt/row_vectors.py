"""DoRA's factors and adapters' biases on the device: for each row a place in every input of them.

    lora_scale.L.GROUP, lora_bias.L.GROUP   [rows, 1, n]    1 and 0 for rows without

Places have addresses that never change, so a graph that was captured with them serves every mix. A
row's place is written when the mix of what is to be computed in it changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from remora_agent.engine.protocol import Mix
from remora_agent.engine.trt.arrays import Writer
from remora_agent.engine.trt.memory import Memory
from remora_agent.engine.vectors import Entries, packed
from remora_contract.bank_inputs import VectorInput, neutral
from remora_contract.decoder import DecoderSpec


class RowVectors:
    def __init__(
        self,
        memory: Memory,
        decoder: DecoderSpec,
        inputs: tuple[VectorInput, ...],
        rows: int,
        writer: Writer,
    ) -> None:
        """Raises Exhausted."""
        self._decoder = decoder
        self._inputs = inputs
        self._rows = rows
        self._writer = writer
        # None: it is not known what the place holds.
        self._held: list[Mix | None] = [None] * rows
        size = rows * writer.dtype.itemsize
        self._at = {v.name: memory.device(size * v.width, f"rows' {v.name}") for v in inputs}

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """By input name, of the first `rows`."""
        return {v.name: (rows, 1, v.width) for v in self._inputs}

    def addresses(self) -> Mapping[str, int]:
        return self._at

    def other(self, wanted: Mapping[int, Mix]) -> dict[int, Mix]:
        """Of the mixes wanted by row, those that the rows do not hold."""
        return {row: mix for row, mix in wanted.items() if self._held[row] != mix}

    def holding(self, handle: int) -> Iterator[int]:
        """Rows that hold an adapter, or may."""
        for row, mix in enumerate(self._held):
            if mix is None or any(entry.handle == handle for entry in mix):
                yield row

    def clear(self) -> None:
        """Every row without any."""
        for row in range(self._rows):
            self.write(row, (), ())

    def write(self, row: int, mix: Mix, entries: Entries) -> None:
        """Queues what `mix`, which is `entries`, needs in a row."""
        self._held[row] = None  # until all of it is queued
        for v in self._inputs:
            dtype = self._writer.dtype
            size = v.width * dtype.itemsize
            at = self._at[v.name] + row * size
            found = packed(self._decoder, v.kind, v.layer, v.group, entries, dtype)
            if found is not None:
                self._writer.put_rows(found[None], at, size)
            elif neutral(v.kind):
                self._writer.one(at, v.width)
            else:
                self._writer.zero(at, v.width)
        self._held[row] = mix
