"""What merging does to one tensor of the checkpoint, as data. Pure.

For a weight W (as the checkpoint stores it), adapters i with weights w_i and scalings s_i:

    base[t] = trained row                   for trained tokens t; else base: W, or what an adapter
    W' = base + Σ_i w_i s_i B_i A_i         saved in its place
    W' = m ∘ W' / ‖W'‖                      with DoRA, ‖·‖ over each output's weights

and a bias b' = base + Σ_i w_i s_i (bias of B_i). A is [r, k] and B [n, r], PEFT's convention;
Linear stores W as [n, k], Conv1D and embeddings as [k, n] (`transposed`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from remora_contract.errors import Unsupported


@dataclass(frozen=True)
class Experts:
    """How `count` experts lie stacked in factors A [count·r, k] and B [n, r·count] (in B, expert e
    has the columns e, e + count, …). `index`: the expert of this tensor, None when the tensor
    stacks them all; `rows`: which of the n outputs are this tensor's, for gate and up fused."""

    count: int
    index: int | None
    rows: tuple[int, int]


@dataclass(frozen=True)
class LowRank:
    """One adapter's product. `scale` is w_i s_i; `rank` of one expert where there are experts."""

    adapter: int
    a: str
    b: str
    rank: int
    scale: float
    transposed: bool = False
    experts: Experts | None = None


@dataclass(frozen=True)
class Shift:
    """bias += scale · vector."""

    adapter: int
    tensor: str
    scale: float


@dataclass(frozen=True)
class Magnitude:
    """DoRA: `per` row of the stored weight, or per column (Conv1D, embeddings)."""

    adapter: int
    tensor: str
    per: Literal["row", "column"]


@dataclass(frozen=True)
class Replacement:
    """The whole tensor as an adapter saved it; `trained`: not only the base layer's copy."""

    adapter: int
    tensor: str
    trained: bool


@dataclass(frozen=True)
class TokenRows:
    """Rows `indices` become the rows of `tensor` [len(indices), hidden], in that order."""

    adapter: int
    tensor: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Change:
    base: Replacement | None = None
    products: tuple[LowRank, ...] = ()
    shifts: tuple[Shift, ...] = ()
    magnitude: Magnitude | None = None
    rows: tuple[TokenRows, ...] = ()


Changes = Mapping[str, Change]  # checkpoint tensor -> change


def together(first: Change, second: Change) -> Change:
    """Both changes of one tensor; at most one of them replaces it."""
    return Change(
        base=first.base or second.base,
        products=first.products + second.products,
        shifts=first.shifts + second.shifts,
        magnitude=first.magnitude or second.magnitude,
        rows=first.rows + second.rows,
    )


def combine(parts: Iterable[Changes]) -> dict[str, Change]:
    """The sum of several adapters' changes. Raises Unsupported naming a tensor they dispute."""
    total: dict[str, Change] = {}
    for part in parts:
        for name, change in part.items():
            if name in total:
                _check_sum(name, total[name], change)
                change = together(total[name], change)
            total[name] = change
    return total


def _check_sum(name: str, first: Change, second: Change) -> None:
    bases = [c.base for c in (first, second) if c.base is not None]
    if len(bases) == 2 or any(base.trained for base in bases):
        raise Unsupported(
            f"{name} is trained as a whole by one adapter and changed by another: there is no sum "
            "of the two; merge only one of them"
        )
    indices = [i for c in (first, second) for rows in c.rows for i in rows.indices]
    if len(set(indices)) != len(indices):
        raise Unsupported(f"{name}: two adapters train the same token; merge only one of them")
