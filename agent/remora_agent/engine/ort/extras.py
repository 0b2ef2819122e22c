"""What a mix changes beyond factors on the layers' projections, as arrays an engine can bind.

    scale   [1, 1, n] a packed group: DoRA's factors, 1 for outputs without one
    bias    [1, 1, n] a packed group: the mix's biases, weighted
    embed   [m, hidden] for m tokens: computed here, where the tokens are known

Owns which of them a bundle's graph has; runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights
from remora_agent.engine.ort import names
from remora_agent.engine.ort.values import Buffer
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import RequestInvalid
from remora_contract.targets import EXPERT_GROUPS, MODEL_GROUPS, PARTS, AdapterTarget, Group

Entries = Sequence[tuple[AdapterWeights, float]]
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

    def vectors(self, decoder: DecoderSpec) -> list[tuple[str, str, int, Group]]:
        """(input name, "scale" or "bias", layer, group) of every vector that a row binds."""
        found: list[tuple[str, str, int, Group]] = []
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


def check_together(entries: Entries) -> None:
    """Raises RequestInvalid for a mix in which DoRA is not alone and whole: its factors were made
    for these very weights, and no scaled or summed ones are right for others."""
    for weights, weight in entries:
        if weights.dora and (len(entries) > 1 or weight != 1.0):
            raise RequestInvalid(
                f"adapter {weights.digest[:19]} is a DoRA adapter: it answers alone and with "
                f"weight 1, not with weight {weight:g} beside {len(entries) - 1} other(s)"
            )


class Vectors:
    """Makes the vectors of mixes; those of mixes without any are shared by all."""

    def __init__(self, decoder: DecoderSpec, extras: Extras) -> None:
        self._decoder = decoder
        self._places = extras.vectors(decoder)
        self._neutral: dict[tuple[str, int], Buffer] = {}

    def packed(self, entries: Entries) -> dict[str, Buffer]:
        return {
            name: self._one(kind, layer, group, entries)
            for name, kind, layer, group in self._places
        }

    def _one(self, kind: str, layer: int, group: Group, entries: Entries) -> Buffer:
        parts = PARTS[group]
        widths = [self._decoder.out_features(p) for p in parts]
        found = None
        at = 0
        for part, width in zip(parts, widths, strict=True):
            for weights, weight in entries:
                vectors = weights.vectors.get(AdapterTarget(layer, part))
                own = None if vectors is None else getattr(vectors, kind)
                if own is not None:
                    found = self._blank(kind, sum(widths)) if found is None else found
                    if kind == "scale":
                        found[0, 0, at : at + width] = own
                    else:
                        found[0, 0, at : at + width] += np.float32(weight) * own
            at += width
        return self._shared(kind, sum(widths)) if found is None else Buffer(found)

    def _shared(self, kind: str, width: int) -> Buffer:
        if (kind, width) not in self._neutral:
            self._neutral[kind, width] = Buffer(self._blank(kind, width))
        return self._neutral[kind, width]

    @staticmethod
    def _blank(kind: str, width: int) -> NDArray[np.float32]:
        return np.full((1, 1, width), kind == "scale", np.float32)


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
