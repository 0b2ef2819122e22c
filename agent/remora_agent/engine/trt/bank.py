"""The adapter bank on the device: every resident adapter's factors side by side, at addresses that
never change. Owns columns and what is in them; knows no rows' tokens.

    y = x W + ((x A) * gate) B      A [k, T]   B [T, n]   gate [b, 1, T]
                           experts: A [E, k, T]   B [E, T, n]

A and B of a layer and group have memory for T_max = max_bank_rank * parts columns. T is one of few
sizes (`columns`), and when adapters need a larger one, what depends on it is laid out anew on the
device (`arrays`). Layouts shrink when a group has no adapter left. DoRA's factors and biases are
not of columns but of rows (`row_vectors`). Writes go through a copy stream: they wait for the last
step, and the next step waits for them, so the host never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Mix
from remora_agent.engine.trt.arrays import Place, Writer
from remora_agent.engine.trt.columns import Columns, bucket
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.factors import (
    Accepted,
    group_width,
    in_dtype,
    part_columns,
    vectors_of,
)
from remora_agent.engine.trt.memory import Memory
from remora_agent.engine.trt.row_vectors import RowVectors
from remora_agent.engine.vectors import check_together
from remora_contract import targets
from remora_contract.bank_inputs import factor_shape, neutral_width, places, vector_inputs
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import Exhausted, NotFound
from remora_contract.targets import EXPERT_GROUPS, PARTS, AdapterTarget, Group
from remora_contract.trt_memory import STAGED_BYTES


@dataclass(frozen=True)
class Resident:
    rank: int
    columns: dict[Group, tuple[int, ...]]  # by part, in the packed order
    index: dict[Group, NDArray[np.intp]]  # the same
    around: AdapterWeights  # its vectors alone: they are written with the rows that use them


@dataclass(frozen=True)
class LayerFactors:
    """Where one layer's A and B of a group lie."""

    layer: int
    a: Place
    b: Place


class GroupBank:
    """One group in all its layers."""

    def __init__(self, decoder: DecoderSpec, group: Group, most: int) -> None:
        self.group = group
        self.copies, self.k, self.n = factor_shape(decoder, group)
        self.columns = Columns(most)
        self.bound = 0  # T for which A, and experts' B, are laid out
        self.layers: list[LayerFactors] = []

    @property
    def lead(self) -> tuple[int, ...]:
        """Of experts' arrays the first dimension."""
        return (self.copies,) if self.group in EXPERT_GROUPS else ()

    @property
    def laid_out(self) -> int:
        """Numbers of the largest array that moves with T."""
        widest = max(self.k, self.n) if self.copies > 1 else self.k
        return self.copies * widest * self.columns.most


class Bank:
    def __init__(
        self,
        cuda: Cuda,
        memory: Memory,
        decoder: DecoderSpec,
        graph: GraphSpec,
        streams: tuple[int, int],
    ) -> None:
        """`streams`: that of the steps and that of the copies. Raises Exhausted."""
        self._cuda = cuda
        self._memory = memory
        self._decoder = decoder
        self._max_rank = graph.max_bank_rank
        self._dtype = np.dtype(graph.dtype)
        self._accepted = Accepted(decoder, graph)
        self._vector_inputs = vector_inputs(decoder, graph)
        self._vectors: list[RowVectors] = []
        self._steps, self._copies = streams
        self._resident: dict[int, Resident] = {}
        self._next_handle = 1
        self._groups = _allocate(memory, decoder, graph)
        self._writer = self._make_writer(memory)
        self._stepped = memory.event()
        self._written = memory.event()
        self._others: list[int] = []  # events that writes wait for beside the last step's

    def _make_writer(self, memory: Memory) -> Writer:
        item = self._dtype.itemsize
        size = max((g.laid_out for g in self._groups), default=0) * item
        scratch = memory.device(size, "the bank's layout")
        ones = memory.device(neutral_width(self._vector_inputs) * item, "rows without an adapter")
        widest = max((max(g.n, g.columns.most) for g in self._groups), default=0)
        staging = memory.pinned(max(STAGED_BYTES, widest * item), "adapters on their way")
        return Writer(self._cuda, self._copies, staging, scratch, ones, self._dtype)

    @property
    def groups(self) -> Sequence[GroupBank]:
        return self._groups

    def bound(self, mixes: Sequence[Mix]) -> tuple[int, ...]:
        """T of each group for a step of these mixes: 0 when none of them uses an adapter."""
        if not any(mixes):
            return tuple(0 for _ in self._groups)
        return tuple(g.bound for g in self._groups)

    def addresses(self) -> dict[str, int]:
        """Input name -> address, for good."""
        found = {}
        for g in self._groups:
            for at in g.layers:
                found[targets.lora_a(at.layer, g.group)] = at.a.address
                found[targets.lora_b(at.layer, g.group)] = at.b.address
        return found

    def shapes(self, bound: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for g, t in zip(self._groups, bound, strict=True):
            for at in g.layers:
                found[targets.lora_a(at.layer, g.group)] = (*g.lead, g.k, t)
                found[targets.lora_b(at.layer, g.group)] = (*g.lead, t, g.n)
        return found

    def check_mix(self, mix: Mix) -> None:
        """Raises NotFound, RequestInvalid."""
        check_together(self._entries(mix))

    def row_vectors(self, rows: int) -> RowVectors:
        """Places for the vectors of a step of at most `rows` rows. Raises Exhausted."""
        made = RowVectors(self._memory, self._decoder, self._vector_inputs, rows, self._writer)
        self._vectors.append(made)
        return made

    def hold(self, vectors: RowVectors, mixes: Mapping[int, Mix]) -> None:
        """Makes the given rows hold their mixes' vectors, neutral for those without. Raises
        EngineFault."""
        if not self._vector_inputs:
            return
        changed = vectors.other({row: self._around(mix) for row, mix in mixes.items()})
        if changed:
            with self._writing():
                for row, mix in changed.items():
                    vectors.write(row, mix, self._entries(mix))

    def fill_gate(self, index: int, gate: NDArray[Any], mix: Mix) -> None:
        """Adds a row's weights to gate [T] of the group at `index`."""
        group = self._groups[index].group
        for entry in mix:
            columns = self._find(entry.handle).index.get(group)
            if columns is not None:
                gate[columns] += entry.weight

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """In the graph's dtype, checked. Touches nothing that changes. Raises AdapterInvalid."""
        self._accepted.check(weights)
        return in_dtype(weights, self._dtype)

    def add(self, weights: AdapterWeights) -> int:
        """Raises Exhausted, AdapterInvalid, EngineFault."""
        used = sum(r.rank for r in self._resident.values())
        if used + weights.rank > self._max_rank:
            raise Exhausted(
                f"adapter {weights.digest[:19]} needs rank {weights.rank}; the bank holds "
                f"{used} of {self._max_rank}: unload an adapter, or export with --max-bank-rank"
            )
        weights = self.prepare(weights)
        columns = self._choose(weights)
        with self._writing():
            for g in self._groups:
                if chosen := columns.get(g.group):
                    self._widen(g, bucket(max(g.columns.end, chosen[-1] + 1), g.columns.most))
                    self._clear(g, chosen)
                    self._write(g, chosen, weights)
        for g in self._groups:
            g.columns.take(columns.get(g.group, ()))
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        index = {group: np.array(c, np.intp) for group, c in columns.items()}
        self._resident[handle] = Resident(weights.rank, columns, index, vectors_of(weights))
        return handle

    def remove(self, handle: int) -> None:
        """Raises NotFound."""
        gone = self._find(handle)
        with self._writing():
            for g in self._groups:
                self._clear(g, gone.columns.get(g.group, ()))
            for vectors in self._vectors:
                for row in vectors.holding(handle):
                    vectors.write(row, (), ())
        for g in self._groups:
            g.columns.release(gone.columns.get(g.group, ()))
            if not g.columns.end:
                g.bound = 0
        del self._resident[handle]

    def after(self, event: int) -> None:
        """From now on writes wait for this event too: that of steps on another stream."""
        self._others.append(event)

    def stepped(self) -> None:
        """A step was queued: later writes wait for it."""
        self._cuda.record(self._stepped, self._steps)

    def clear(self) -> None:
        """Queues zeros everywhere, and rows without vectors."""
        with self._writing():
            for g in self._groups:
                for at in g.layers:
                    self._writer.clear_all(at.a, g.columns.most)
                    self._writer.clear_all(at.b, g.columns.most)
            if count := neutral_width(self._vector_inputs):
                self._writer.make_ones(count)
            for vectors in self._vectors:
                vectors.clear()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What is queued meanwhile waits for the last step, and the next step for it."""
        for event in (self._stepped, *self._others):
            self._cuda.wait(self._copies, event)
        try:
            yield
        finally:
            self._cuda.record(self._written, self._copies)
            self._cuda.wait(self._steps, self._written)

    def _choose(self, weights: AdapterWeights) -> dict[Group, tuple[int, ...]]:
        """Free columns for it, of groups that it changes. Raises Exhausted."""
        found: dict[Group, tuple[int, ...]] = {}
        for g in self._groups:
            columns = g.columns.free(group_width(weights, g.group))
            if columns is None:  # ranks are counted: each part takes at most the adapter's
                raise Exhausted(f"the bank has no columns left in group {g.group}")
            if columns:
                found[g.group] = columns
        return found

    def _find(self, handle: int) -> Resident:
        if handle not in self._resident:
            raise NotFound(f"no resident adapter has handle {handle}")
        return self._resident[handle]

    def _entries(self, mix: Mix) -> list[tuple[AdapterWeights, float]]:
        """Without factors. Raises NotFound."""
        return [(self._find(entry.handle).around, entry.weight) for entry in mix]

    def _around(self, mix: Mix) -> Mix:
        """The part of it that has vectors."""
        return tuple(e for e in mix if self._find(e.handle).around.vectors)

    def _widen(self, g: GroupBank, bound: int) -> None:
        if bound <= g.bound:
            return
        for at in g.layers:
            for place in (at.a, at.b):
                self._writer.widen(place, g.bound, bound)
        g.bound = bound

    def _clear(self, g: GroupBank, columns: tuple[int, ...]) -> None:
        """Zeros in A's columns and B's rows, in every layer."""
        for at in g.layers:
            for place in (at.a, at.b):
                self._writer.clear(place, g.bound, columns)

    def _write(self, g: GroupBank, columns: tuple[int, ...], weights: AdapterWeights) -> None:
        outputs = {p: self._decoder.out_features(p) for p in PARTS[g.group]}
        for part, own, skipped in part_columns(weights, g.group, columns, outputs):
            for at in g.layers:
                factors = weights.tensors.get(AdapterTarget(at.layer, part))
                if factors is None:
                    continue
                a, b = factors
                rank = a.shape[-1]
                block = a.reshape(g.copies * g.k, rank, 1)
                self._writer.put(at.a, g.bound, own[:rank], block)
                block = b.reshape(g.copies, rank, outputs[part])
                self._writer.put(at.b, g.bound, own[:rank], block, skipped)


def _allocate(memory: Memory, decoder: DecoderSpec, graph: GraphSpec) -> list[GroupBank]:
    found: dict[Group, GroupBank] = {}
    item = np.dtype(graph.dtype).itemsize
    for layer, group in places(decoder, graph):
        if group not in found:
            most = graph.max_bank_rank * len(PARTS[group])
            found[group] = GroupBank(decoder, group, most)
        g = found[group]
        size = g.columns.most * g.copies * item
        a = memory.device(g.k * size, f"the bank's A of layer {layer}, {group}")
        b = memory.device(g.n * size, f"the bank's B of layer {layer}, {group}")
        factors = LayerFactors(layer, Place(a, g.copies * g.k, 1), Place(b, g.copies, g.n))
        g.layers.append(factors)
    return list(found.values())
