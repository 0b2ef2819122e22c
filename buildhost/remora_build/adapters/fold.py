"""The algebra of one module: PEFT's factors to the bank's, scale folded.

    PEFT:    y += scaling * (x A^T) B^T      A [r, k]   B [n, r]
    Remora:  y += (x a) b                    a = A^T [k, r]   b = scaling * B^T [r, n]

in float32, whatever the factors were stored in. Rows of a fused module's B are columns of b, so its
projections share a. A module of experts holds all of theirs, A [experts * r, k] one expert below
the other, B [n, r * experts] one rank beside the other. Pure; the orientation is PEFT's convention
and never read off a shape, so rank = k = n is no special case.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.bound import Binding, Layout
from remora_build.adapters.finite import all_finite, largest
from remora_build.adapters.sidecar import Factor
from remora_contract.errors import AdapterInvalid
from remora_contract.targets import AdapterTarget

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Folded:
    """A module's branch: a [k, r], b [r, n]; of stacked experts a [E, k, r], b [E, r, n]."""

    a: Array
    b: Array

    def minus(self, first: Folded) -> Folded:
        """(x a) b - (x a0) b0 as one branch of both ranks."""
        return Folded(np.concatenate([self.a, first.a], -1), np.concatenate([self.b, -first.b], -2))


def fold(binding: Binding, lora_a: Array, lora_b: Array, experts: int = 1) -> Folded:
    """`lora_a`, `lora_b` as PEFT has them for the binding's layout, taken over: the branch is
    views of them, and b is scaled in place.

    Raises AdapterInvalid naming a tensor that is not finite.
    """
    check_finite(lora_a, binding.tensor_a)
    a, b = _turned(binding.place.layout, lora_a, lora_b, experts)
    return Folded(a, scaled(b, binding.scaling, binding.tensor_b))


def scaled(values: Array, scaling: float, name: str) -> Array:
    """`values`, multiplied in place. Raises AdapterInvalid when one is not finite or its product
    leaves float32."""
    check_finite(values, name)
    factor = np.float32(scaling)
    with np.errstate(over="ignore"):
        if not np.isfinite(np.float32(largest(values)) * factor):
            raise AdapterInvalid(f"{name}: times {scaling} it leaves float32")
    values *= factor
    return values


def parted(binding: Binding, folded: Folded) -> Iterator[tuple[AdapterTarget, int | None, Folded]]:
    """(target, which expert, branch) of each projection that the module holds."""
    for part in binding.place.parts:
        whole = (part.begin, part.end) == (0, folded.b.shape[-1])
        columns = folded.b if whole else folded.b[..., part.begin : part.end]
        if binding.place.layout == "embedding":  # its rows are looked up, none is cut
            columns = folded.b
        yield part.target, part.expert, Folded(folded.a, columns)


def joined(branches: Mapping[int, Folded], experts: int) -> Folded:
    """Branches of single experts as one for all: narrower ones and experts without one get
    zeros."""
    rank = max(f.a.shape[-1] for f in branches.values())
    first = next(iter(branches.values()))
    a = np.zeros((experts, first.a.shape[0], rank), np.float32)
    b = np.zeros((experts, rank, first.b.shape[-1]), np.float32)
    for expert, branch in branches.items():
        a[expert, :, : branch.a.shape[-1]] = branch.a
        b[expert, : branch.b.shape[-2]] = branch.b
    return Folded(a, b)


def without_factors(k: int, n: int, bias: Array) -> Factor:
    """Of a target with nothing but a bias."""
    empty = np.zeros((k, 0), np.float32), np.zeros((0, n), np.float32)
    return Factor(*empty, 1.0, bias=bias)


def check_finite(values: Array, name: str) -> None:
    """0 * inf is NaN: one such number would spoil the rows that do not even use the adapter."""
    if not all_finite(values):
        raise AdapterInvalid(f"tensor {name} holds NaN or infinity; the adapter is damaged")


def row_norms(blocks: Iterable[tuple[int, int, Array]], folded: Folded) -> NDArray[np.float64]:
    """||W + (a b)^T|| over k for each of the n outputs: what DoRA divides its magnitudes by.

    `blocks` are W [n, k] in pieces: (first n, first k, [some n, some k]).
    """
    squares = np.zeros(folded.b.shape[-1], np.float64)
    for first_n, first_k, block in blocks:
        rows = slice(first_n, first_n + block.shape[0])
        a = folded.a[first_k : first_k + block.shape[1]]
        adapted = block + (a @ folded.b[:, rows]).T
        squares[rows] += np.einsum("nk,nk->n", adapted, adapted, dtype=np.float64)
    return np.sqrt(squares)


def _turned(layout: Layout, a: Array, b: Array, experts: int) -> tuple[Array, Array]:
    if layout != "experts":
        return a.T, b.T
    rank = len(a) // experts
    return (
        a.reshape(experts, rank, -1).transpose(0, 2, 1),
        b.reshape(len(b), rank, experts).transpose(2, 1, 0),
    )
