"""Adapters on experts: the mixes of one step side by side, as the bank of docs/graph.md has them.

    a     [experts, k, T]      b  [experts, T, n], block-diagonal over the group's parts, weights in
    gate  [rows, 1, T]         1 over the columns of the row's mix, else 0

Tokens of all rows meet in one expert, so rows have no slots of their own here. Made when the mixes
of a step change; a few are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.ort import names
from remora_agent.engine.ort.values import Buffer
from remora_agent.engine.protocol import Mix
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import EXPERT_GROUPS, PARTS, AdapterTarget, Group, Projection

Entries = Sequence[tuple[AdapterWeights, float]]
K = TypeVar("K")
_KEPT = 4


class ExpertSlots:
    """Of a decoder with experts. `entries` gives a mix's adapters and weights."""

    def __init__(self, decoder: DecoderSpec, entries: Callable[[Mix], Entries]) -> None:
        self._decoder = decoder
        self._entries = entries
        self._made: OrderedDict[tuple[tuple[int, Mix], ...], dict[str, Buffer]] = OrderedDict()
        self._factors: OrderedDict[tuple[Mix, ...], dict[str, Buffer]] = OrderedDict()

    def forget(self) -> None:
        """An adapter has gone: nothing made of it may stay."""
        self._made.clear()
        self._factors.clear()

    def bound(self, count: int, mixes: Mapping[int, Mix]) -> Mapping[str, Buffer]:
        """Inputs for rows 0..count-1, `mixes` by row; the same object for the same rows."""
        key = ((count, ()), *sorted(mixes.items()))
        if key not in self._made:
            distinct = tuple(dict.fromkeys(mixes.values()))
            if distinct not in self._factors:
                self._factors[distinct] = self._pack(distinct)
                _trim(self._factors)
            gates = self._gates(count, mixes, distinct)
            self._made[key] = {**self._factors[distinct], **gates}
            _trim(self._made)
        self._made.move_to_end(key)
        return self._made[key]

    def _pack(self, distinct: Sequence[Mix]) -> dict[str, Buffer]:
        packed: dict[str, Buffer] = {}
        for layer in range(self._decoder.layers):
            for group in self._decoder.groups(layer):
                if group in EXPERT_GROUPS:
                    a, b = self._group(layer, group, distinct)
                    packed[names.expert_a(layer, group)] = Buffer(a)
                    packed[names.expert_b(layer, group)] = Buffer(b)
        return packed

    def _group(
        self, layer: int, group: Group, distinct: Sequence[Mix]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        decoder, parts = self._decoder, PARTS[group]
        count, total = decoder.copies(parts[0]), self._columns(group, distinct)
        outs = [decoder.out_features(p) for p in parts]
        a = np.zeros((count, decoder.in_features(parts[0]), total), np.float32)
        b = np.zeros((count, total, sum(outs)), np.float32)
        at = 0
        for mix in distinct:
            for i, part in enumerate(parts):
                first = sum(outs[:i])
                for weights, weight in self._entries(mix):
                    found = weights.tensors.get(AdapterTarget(layer, part))
                    if found is not None:
                        rank = found[0].shape[-1]
                        a[..., at : at + rank] = found[0]
                        own = b[:, at : at + rank, first : first + outs[i]]
                        np.multiply(found[1], np.float32(weight), out=own, dtype=np.float32)
                    at += weights.rank_of(part)
        return a, b

    def _gates(
        self, count: int, mixes: Mapping[int, Mix], distinct: Sequence[Mix]
    ) -> dict[str, Buffer]:
        made: dict[str, Buffer] = {}
        for group in EXPERT_GROUPS:
            gate = np.zeros((count, 1, self._columns(group, distinct)), np.float32)
            at = 0
            for mix in distinct:
                width = sum(self._width(mix, part) for part in PARTS[group])
                for row in (r for r, m in mixes.items() if m == mix):
                    gate[row, 0, at : at + width] = 1
                at += width
            made[names.expert_gate(group)] = Buffer(gate)
        return made

    def _columns(self, group: Group, distinct: Sequence[Mix]) -> int:
        """At least one: ONNX Runtime 1.23 multiplies no empty axis."""
        return max(1, sum(self._width(mix, part) for mix in distinct for part in PARTS[group]))

    def _width(self, mix: Mix, part: Projection) -> int:
        """The same in every layer."""
        return sum(weights.rank_of(part) for weights, _ in self._entries(mix))


def _trim(kept: OrderedDict[K, dict[str, Buffer]]) -> None:
    while len(kept) > _KEPT:
        kept.popitem(last=False)
