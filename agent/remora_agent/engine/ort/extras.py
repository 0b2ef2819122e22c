"""What a mix changes beyond factors on the layers' projections, as arrays an engine can bind.

    scale   [1, 1, n] a packed group: DoRA's factors, 1 for outputs without one
    bias    [1, 1, n] a packed group: the mix's biases, weighted
    embed   [m, hidden] for m tokens: computed here, where the tokens are known

Owns which of them a bundle's graph has; runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.ort import names
from remora_agent.engine.ort.values import Buffer
from remora_agent.engine.vectors import Entries, packed
from remora_contract.bank_inputs import VectorKind, neutral
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import EXPERT_GROUPS, MODEL_GROUPS, PARTS, AdapterTarget, Group

_EMBED = AdapterTarget(0, "embed")


@dataclass(frozen=True)
class Extras:
    """Of a bundle's graph."""

    dora: bool = False
    bias: bool = False
    embed: bool = False
    head: bool = False
    experts: bool = False

    @staticmethod
    def of(graph: GraphSpec | None) -> Extras:
        if graph is None or not graph.max_bank_rank:
            return Extras()
        adapt = graph.adapt
        return Extras(
            graph.dora, graph.adapter_bias, "embed" in adapt, "head" in adapt, "experts" in adapt
        )

    def groups(self, decoder: DecoderSpec) -> list[tuple[int, Group]]:
        """Every group with arrays of factors that a row binds."""
        found = [
            (layer, group)
            for layer in range(decoder.layers)
            for group in decoder.groups(layer)
            if group not in EXPERT_GROUPS
        ]
        if self.head:
            found.append((0, "head"))
        return found

    def vectors(self, decoder: DecoderSpec) -> list[tuple[str, VectorKind, int, Group]]:
        """(input name, kind, layer, group) of every vector that a row binds."""
        found: list[tuple[str, VectorKind, int, Group]] = []
        places = self.groups(decoder)
        if self.embed:
            places.append((0, "embed"))
        for layer, group in places:
            if self.dora:
                found.append((names.slot_scale(layer, group), "scale", layer, group))
            if self.bias and group != "embed":
                found.append((names.slot_bias(layer, group), "bias", layer, group))
        return found


def uses_extras(weights: AdapterWeights) -> bool:
    """Whether it needs more than factors on the layers' projections."""
    beyond = {t.group for t in weights.tensors} & {*MODEL_GROUPS, *EXPERT_GROUPS}
    return bool(weights.vectors or beyond)


class Vectors:
    """Makes the vectors of mixes; those of mixes without any are shared by all."""

    def __init__(self, decoder: DecoderSpec, extras: Extras) -> None:
        self._decoder = decoder
        self._places = extras.vectors(decoder)
        self._neutral: dict[tuple[VectorKind, int], Buffer] = {}

    def packed(self, entries: Entries) -> dict[str, Buffer]:
        return {
            name: self._one(kind, layer, group, entries)
            for name, kind, layer, group in self._places
        }

    def _one(self, kind: VectorKind, layer: int, group: Group, entries: Entries) -> Buffer:
        found = packed(self._decoder, kind, layer, group, entries)
        if found is not None:
            return Buffer(found[None, None])
        return self._shared(kind, sum(self._decoder.out_features(p) for p in PARTS[group]))

    def _shared(self, kind: VectorKind, width: int) -> Buffer:
        if (kind, width) not in self._neutral:
            blank = np.full((1, 1, width), neutral(kind), np.float32)
            self._neutral[kind, width] = Buffer(blank)
        return self._neutral[kind, width]


def embedding_change(entries: Entries, tokens: NDArray[np.int64]) -> NDArray[np.float32] | None:
    """[m, hidden] that the mix adds to the rows of `tokens` [m]; None when it adds nothing."""
    change = None
    for weights, weight in entries:
        factors = weights.tensors.get(_EMBED)
        if factors is not None:
            a, b = factors
            low = a[tokens].astype(np.float32)
            own = (low @ b.astype(np.float32)) * np.float32(weight)
            change = own if change is None else change + own
    return change
