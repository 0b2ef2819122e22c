"""An adapter's factors as the bank takes them: checked, in the graph's dtype, by part. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights, Factors
from remora_contract.bundle import GraphSpec, bank_groups, model_bank_groups
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import PARTS, AdapterTarget, Group, Projection


def places(decoder: DecoderSpec, graph: GraphSpec) -> Iterator[tuple[int, Group]]:
    """Layer and group of everything that the bank holds; of `embed` and `head` the layer is 0."""
    for layer in range(decoder.layers):
        for group in bank_groups(decoder, graph, layer):
            yield layer, group
    for outside in model_bank_groups(graph):
        yield 0, outside


def check(decoder: DecoderSpec, weights: AdapterWeights, groups: Collection[Group]) -> None:
    """Raises AdapterInvalid for a target that the engine has no input for, or of another shape."""
    who = f"adapter {weights.digest[:19]}"
    if weights.vectors:
        name = next(iter(weights.vectors)).name()
        raise AdapterInvalid(
            f"{who}: {name} has DoRA factors or a bias, which TensorRT engines do not take; "
            "merge it, or serve it on ONNX Runtime"
        )
    for target, (a, b) in weights.tensors.items():
        if not 0 <= target.layer < decoder.layers:
            raise AdapterInvalid(
                f"{who}: {target.name()} does not exist; the model has {decoder.layers} layers"
            )
        if groups and target.group not in groups:
            raise AdapterInvalid(
                f"{who} changes {target.name()}, for which the engine has no input"
            )
        k, n = decoder.in_features(target.projection), decoder.out_features(target.projection)
        rank = a.shape[-1] if a.ndim else 0
        if not rank or a.shape != (k, rank) or b.shape != (rank, n):
            raise AdapterInvalid(
                f"{who}: {target.name()} has A {list(a.shape)} and B {list(b.shape)}, "
                f"not [{k}, r] and [r, {n}]"
            )


def in_dtype(weights: AdapterWeights, dtype: np.dtype[Any]) -> dict[AdapterTarget, Factors]:
    """Raises AdapterInvalid when a number does not fit: infinity would spoil every answer."""
    found: dict[AdapterTarget, Factors] = {}
    for target, (a, b) in weights.tensors.items():
        found[target] = _cast(weights, target, a, dtype), _cast(weights, target, b, dtype)
    return found


def _cast(
    weights: AdapterWeights, target: AdapterTarget, array: NDArray[Any], dtype: np.dtype[Any]
) -> NDArray[Any]:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise AdapterInvalid(
            f"adapter {weights.digest[:19]}: {target.name()} has numbers that {dtype} cannot hold; "
            "export the bundle with --dtype float32"
        )
    return cast


def group_width(weights: AdapterWeights, group: Group) -> int:
    """Columns it takes in a group: of each part as many as its widest layer has."""
    return sum(weights.rank_of(p) for p in PARTS[group])


def part_columns(
    weights: AdapterWeights,
    group: Group,
    columns: tuple[int, ...],
    outputs: Mapping[Projection, int],
) -> Iterator[tuple[Projection, tuple[int, ...], int]]:
    """Each part, its own of the group's columns and where its outputs begin in packed [n]."""
    at = skipped = 0
    for part in PARTS[group]:
        rank = weights.rank_of(part)
        if rank:
            yield part, columns[at : at + rank], skipped
        at += rank
        skipped += outputs[part]
