"""An adapter as the bank takes it: checked, in the graph's dtype, by part. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_agent.bank.weights import AdapterWeights, Factors, Vectors
from remora_contract.bank_inputs import VectorKind, places, vector_inputs
from remora_contract.bundle import GraphSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import EXPERT_GROUPS, PARTS, AdapterTarget, Group, Projection

_EXPORTED_WITH: dict[VectorKind, str] = {"scale": "--dora", "bias": "--adapter-bias"}


class Accepted:
    """What the graph has inputs for."""

    def __init__(self, decoder: DecoderSpec, graph: GraphSpec) -> None:
        self._decoder = decoder
        self._factors = frozenset(places(decoder, graph))
        self._vectors = frozenset((v.kind, v.layer, v.group) for v in vector_inputs(decoder, graph))

    def check(self, weights: AdapterWeights) -> None:
        """Raises AdapterInvalid for a target that the engine has no input for, or of another
        shape."""
        who = f"adapter {weights.digest[:19]}"
        for target, (a, b) in weights.tensors.items():
            self._check_target(who, target)
            self._check_factors(who, target, a, b)
        for target, vectors in weights.vectors.items():
            self._check_target(who, target)
            self._check_vector(who, target, "scale", vectors.scale)
            self._check_vector(who, target, "bias", vectors.bias)

    def _check_target(self, who: str, target: AdapterTarget) -> None:
        layers = self._decoder.layers
        if not 0 <= target.layer < layers:
            raise AdapterInvalid(
                f"{who}: {target.name()} does not exist; the model has {layers} layers"
            )
        if self._factors and (target.layer, target.group) not in self._factors:
            raise AdapterInvalid(
                f"{who} changes {target.name()}, for which the engine has no input"
            )

    def _check_factors(
        self, who: str, target: AdapterTarget, a: NDArray[Any], b: NDArray[Any]
    ) -> None:
        decoder, part = self._decoder, target.projection
        k, n = decoder.in_features(part), decoder.out_features(part)
        lead = (decoder.copies(part),) if target.group in EXPERT_GROUPS else ()
        rank = a.shape[-1] if a.ndim else 0
        if not rank or a.shape != (*lead, k, rank) or b.shape != (*lead, rank, n):
            before = "".join(f"{count}, " for count in lead)
            raise AdapterInvalid(
                f"{who}: {target.name()} has A {list(a.shape)} and B {list(b.shape)}, "
                f"not [{before}{k}, r] and [{before}r, {n}]"
            )

    def _check_vector(
        self, who: str, target: AdapterTarget, kind: VectorKind, vector: NDArray[Any] | None
    ) -> None:
        if vector is None:
            return
        n = self._decoder.out_features(target.projection)
        if (kind, target.layer, target.group) not in self._vectors or vector.shape != (n,):
            raise AdapterInvalid(
                f"{who}: {target.name()} has a {kind} {list(vector.shape)}; the engine takes [{n}] "
                f"of a bundle exported with {_EXPORTED_WITH[kind]}"
            )


def in_dtype(weights: AdapterWeights, dtype: np.dtype[Any]) -> AdapterWeights:
    """Raises AdapterInvalid when a number does not fit: infinity would spoil every answer."""

    def cast(target: AdapterTarget, array: NDArray[Any] | None) -> NDArray[Any] | None:
        return None if array is None else _cast(weights, target, array, dtype)

    tensors: dict[AdapterTarget, Factors] = {}
    for target, (a, b) in weights.tensors.items():
        tensors[target] = _cast(weights, target, a, dtype), _cast(weights, target, b, dtype)
    vectors = {
        target: Vectors(cast(target, pair.scale), cast(target, pair.bias))
        for target, pair in weights.vectors.items()
    }
    return replace(weights, tensors=tensors, vectors=vectors)


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


def vectors_of(weights: AdapterWeights) -> AdapterWeights:
    """Without its factors, and without keeping the file alive that all of it was read from."""
    own = {
        target: Vectors(*(None if v is None else v.copy() for v in (pair.scale, pair.bias)))
        for target, pair in weights.vectors.items()
    }
    return AdapterWeights(weights.digest, {}, own)


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
