"""What a portable graph takes of adapters, by layer and packed group, and how wide. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from remora_contract import targets
from remora_contract.bundle import GraphSpec, bank_groups, model_bank_groups
from remora_contract.decoder import DecoderSpec
from remora_contract.targets import EXPERT_GROUPS, PARTS, Group

VectorKind = Literal["scale", "bias"]


def places(decoder: DecoderSpec, graph: GraphSpec) -> Iterator[tuple[int, Group]]:
    """Layer and group of everything that the bank holds; of `embed` and `head` the layer is 0."""
    for layer in range(decoder.layers):
        for group in bank_groups(decoder, graph, layer):
            yield layer, group
    for outside in model_bank_groups(graph):
        yield 0, outside


@dataclass(frozen=True)
class VectorInput:
    """An input [rows, 1, width] of DoRA's factors or biases."""

    name: str
    kind: VectorKind
    layer: int
    group: Group
    width: int


def neutral(kind: VectorKind) -> float:
    """Of an output that no adapter touches."""
    return 1.0 if kind == "scale" else 0.0


def vector_inputs(decoder: DecoderSpec, graph: GraphSpec) -> tuple[VectorInput, ...]:
    """All that the graph has; experts have none, and the embedding no bias."""
    found: list[VectorInput] = []
    for layer, group in places(decoder, graph):
        if group in EXPERT_GROUPS:
            continue
        width = sum(decoder.out_features(p) for p in PARTS[group])
        if graph.dora:
            name = targets.lora_scale(layer, group)
            found.append(VectorInput(name, "scale", layer, group, width))
        if graph.adapter_bias and group != "embed":
            name = targets.lora_bias(layer, group)
            found.append(VectorInput(name, "bias", layer, group, width))
    return tuple(found)


def neutral_width(inputs: tuple[VectorInput, ...]) -> int:
    """Of the widest that is not 0 for rows without an adapter."""
    return max((v.width for v in inputs if neutral(v.kind)), default=0)


def factor_shape(decoder: DecoderSpec, group: Group) -> tuple[int, int, int]:
    """(copies, k, n) of a packed group's A [copies * k, T] and B [copies, T, n]; one copy but for
    experts."""
    parts = PARTS[group]
    copies = decoder.copies(parts[0]) if group in EXPERT_GROUPS else 1
    return copies, decoder.in_features(parts[0]), sum(decoder.out_features(p) for p in parts)
