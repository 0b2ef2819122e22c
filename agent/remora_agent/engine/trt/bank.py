"""The adapter bank on the device: every resident adapter's factors side by side, at addresses that
never change. Owns columns and their bytes; knows no rows' tokens.

    y = x W + ((x A) * gate) B      A [k, T]   B [T, n]   gate [b, 1, T]

A and B of a layer and group have memory for T_max = max_bank_rank * parts columns. A is row-major
and T its inner dimension, so its bytes lie as the bound T says: T is one of few sizes (`columns`),
and when adapters need a larger one, A is laid out anew on the device, B only grows at its end.
Layouts shrink when a group has no adapter left. Writes go through a copy stream: they wait for the
last step, and the next step waits for them, so the host never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.protocol import Mix
from remora_agent.engine.trt.columns import Columns, bucket, runs
from remora_agent.engine.trt.cuda import Cuda
from remora_agent.engine.trt.factors import check, group_width, in_dtype, part_columns, places
from remora_agent.engine.trt.memory import Memory
from remora_contract import targets
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import Exhausted, NotFound
from remora_contract.targets import PARTS, AdapterTarget, Group

STAGED_BYTES = 4 << 20  # pinned memory through which factors travel


@dataclass(frozen=True)
class Resident:
    rank: int
    columns: dict[Group, tuple[int, ...]]  # by part, in the packed order
    index: dict[Group, NDArray[np.intp]]  # the same


@dataclass(frozen=True)
class LayerFactors:
    """Where one layer's A and B of a group lie."""

    layer: int
    a: int
    b: int


class GroupBank:
    """One group in all its layers."""

    def __init__(self, decoder: DecoderSpec, group: Group, most: int) -> None:
        self.group = group
        self.k = decoder.in_features(PARTS[group][0])
        self.n = sum(decoder.out_features(p) for p in PARTS[group])
        self.columns = Columns(most)
        self.bound = 0  # T for which A is laid out
        self.layers: list[LayerFactors] = []


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
        self._decoder = decoder
        self._max_rank = graph.max_bank_rank
        self._dtype = np.dtype(graph.dtype)
        self._steps, self._copies = streams
        self._resident: dict[int, Resident] = {}
        self._next_handle = 1
        self._groups = _allocate(memory, decoder, graph)
        size = max((g.k * g.columns.most for g in self._groups), default=0) * self._dtype.itemsize
        self._scratch = memory.device(size, "the bank's layout")
        widest = max((max(g.n, g.columns.most) for g in self._groups), default=0)
        staged = max(STAGED_BYTES, widest * self._dtype.itemsize)
        self._staging = memory.pinned(staged, "adapters on their way")
        self._stepped = memory.event()
        self._written = memory.event()
        self._others: list[int] = []  # events that writes wait for beside the last step's

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
                found[targets.lora_a(at.layer, g.group)] = at.a
                found[targets.lora_b(at.layer, g.group)] = at.b
        return found

    def shapes(self, bound: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {}
        for g, t in zip(self._groups, bound, strict=True):
            for at in g.layers:
                found[targets.lora_a(at.layer, g.group)] = (g.k, t)
                found[targets.lora_b(at.layer, g.group)] = (t, g.n)
        return found

    def check_mix(self, mix: Mix) -> None:
        """Raises NotFound."""
        for entry in mix:
            self._find(entry.handle)

    def fill_gate(self, index: int, gate: NDArray[Any], mix: Mix) -> None:
        """Adds a row's weights to gate [T] of the group at `index`."""
        group = self._groups[index].group
        for entry in mix:
            columns = self._find(entry.handle).index.get(group)
            if columns is not None:
                gate[columns] += entry.weight

    def prepare(self, weights: AdapterWeights) -> AdapterWeights:
        """In the graph's dtype, checked. Touches nothing that changes. Raises AdapterInvalid."""
        check(self._decoder, weights, {g.group for g in self._groups})
        return replace(weights, tensors=in_dtype(weights, self._dtype))

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
                    self._lay_out(g, bucket(max(g.columns.end, chosen[-1] + 1), g.columns.most))
                    self._clear(g, chosen)
                    self._write(g, chosen, weights)
        for g in self._groups:
            g.columns.take(columns.get(g.group, ()))
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        index = {group: np.array(c, np.intp) for group, c in columns.items()}
        self._resident[handle] = Resident(weights.rank, columns, index)
        return handle

    def remove(self, handle: int) -> None:
        """Raises NotFound."""
        gone = self._find(handle)
        with self._writing():
            for g in self._groups:
                self._clear(g, gone.columns.get(g.group, ()))
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
        """Queues zeros everywhere."""
        with self._writing():
            for g in self._groups:
                for at in g.layers:
                    size = g.columns.most * self._dtype.itemsize
                    self._cuda.clear(at.a, g.k * size, self._copies)
                    self._cuda.clear(at.b, g.n * size, self._copies)

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

    def _lay_out(self, g: GroupBank, bound: int) -> None:
        """Makes A [k, bound] of A [k, g.bound]; the new columns are zeros."""
        if bound <= g.bound:
            return
        item = self._dtype.itemsize
        old, new = g.bound * item, bound * item
        for at in g.layers:
            if old:
                self._cuda.copy(self._scratch, at.a, g.k * old, "on_device", self._copies)
            self._cuda.clear(at.a, g.k * new, self._copies)
            if old:
                ends = (at.a, new), (self._scratch, old)
                self._cuda.copy_2d(*ends, old, g.k, "on_device", self._copies)
        g.bound = bound

    def _clear(self, g: GroupBank, columns: tuple[int, ...]) -> None:
        """Zeros in A's columns and B's rows, in every layer."""
        item = self._dtype.itemsize
        for at in g.layers:
            for _, first, count in runs(columns):
                a = at.a + first * item
                self._cuda.clear_2d(a, g.bound * item, count * item, g.k, self._copies)
                row = g.n * item
                self._cuda.clear(at.b + first * row, count * row, self._copies)

    def _write(self, g: GroupBank, columns: tuple[int, ...], weights: AdapterWeights) -> None:
        item = self._dtype.itemsize
        outputs = {p: self._decoder.out_features(p) for p in PARTS[g.group]}
        for part, own, skipped in part_columns(weights, g.group, columns, outputs):
            for at in g.layers:
                factors = weights.tensors.get(AdapterTarget(at.layer, part))
                if factors is None:
                    continue
                a, b = factors
                for i, first, count in runs(own[: a.shape[1]]):
                    self._put(a[:, i : i + count], at.a + first * item, g.bound * item)
                    place = at.b + (first * g.n + skipped) * item
                    self._put(b[i : i + count], place, g.n * item)

    def _put(self, array: NDArray[Any], address: int, pitch: int) -> None:
        """Copies array [h, w] to rows `pitch` bytes apart, through the staging memory."""
        width = array.shape[1] * self._dtype.itemsize
        at_once = self._staging.size // width
        for begin in range(0, len(array), at_once):
            part = array[begin : begin + at_once]
            self._cuda.synchronize(self._copies)  # what was staged before has left
            self._staging.array(part.shape, self._dtype)[...] = part
            src = (self._staging.address, width)
            dst = (address + begin * pitch, pitch)
            self._cuda.copy_2d(dst, src, width, len(part), "to_device", self._copies)


def _allocate(memory: Memory, decoder: DecoderSpec, graph: GraphSpec) -> list[GroupBank]:
    found: dict[Group, GroupBank] = {}
    item = np.dtype(graph.dtype).itemsize
    for layer, group in places(decoder, graph):
        if group not in found:
            most = graph.max_bank_rank * len(PARTS[group])
            found[group] = GroupBank(decoder, group, most)
        g = found[group]
        size = g.columns.most * item
        g.layers.append(
            LayerFactors(
                layer,
                memory.device(g.k * size, f"the bank's A of layer {layer}, {group}"),
                memory.device(g.n * size, f"the bank's B of layer {layer}, {group}"),
            )
        )
    return list(found.values())
