"""What binding an adapter's tensors gives: every tensor in exactly one place. Data only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from remora_build.adapters.modules import ModuleTable, Parts
from remora_build.adapters.tensor_names import Part
from remora_build.families.shape import Norm

Layout = Literal["linear", "embedding", "experts"]
FACTORS: dict[Layout, tuple[Part, Part]] = {
    "linear": ("A", "B"),
    "embedding": ("embedding_A", "embedding_B"),
    "experts": ("A", "B"),
}


@dataclass(frozen=True)
class Place:
    """Where the factors of a module or parameter lie: `name` is what PEFT's patterns match."""

    name: str
    layout: Layout
    parts: Parts  # which rows of its n are which projection

    @property
    def rows(self) -> int:
        """n of the module's weight [n, k]."""
        return max(part.end for part in self.parts)


@dataclass(frozen=True)
class Binding:
    """An adapted module or parameter: its tensors' names, scaling yet to fold.

    linear     A [r, k], B [n, r]; with lora_bias "B.bias" [n], with DoRA "magnitude" [n]
    embedding  embedding_A [r, vocab], embedding_B [hidden, r]; with DoRA "magnitude" [hidden]
    experts    A [experts * r, k], B [n, r * experts]
    """

    place: Place
    tensors: Mapping[Part, str]
    rank: int
    scaling: float

    @property
    def tensor_a(self) -> str:
        return self.tensors[FACTORS[self.place.layout][0]]

    @property
    def tensor_b(self) -> str:
        return self.tensors[FACTORS[self.place.layout][1]]


@dataclass(frozen=True)
class NormPlace:
    """A norm of a layer; the final one belongs to none."""

    layer: int | None = None
    norm: Norm | None = None

    @property
    def stem(self) -> str:
        """Of its initializers in the graph."""
        return "norm" if self.layer is None else f"layers.{self.layer}.{self.norm}"


@dataclass(frozen=True)
class TokenRows:
    """Rows [tokens, hidden] that replace those of the embedding, or of the head."""

    projection: Literal["embed", "head"]
    tokens: tuple[int, ...]
    tensor: str


@dataclass(frozen=True)
class Bound:
    table: ModuleTable
    factors: tuple[Binding, ...]
    tokens: tuple[TokenRows, ...]
    biases: Mapping[str, str]  # module -> its trained bias [n], the base's included
    norm_biases: Mapping[NormPlace, str]  # a norm's bias, which must be the base's
    repeated: Mapping[str, str]  # embedding or head -> a copy [vocab, hidden] of the base's own
    tied: bool  # the head's adapter is the embedding's, turned
