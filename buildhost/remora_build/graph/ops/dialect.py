"""What a dialect must be able to say. Shapes are the same in every dialect; nodes are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding at given positions: pair i of a head turns by cos[p, i], sin[p, i]."""

    cos: ir.Value  # [positions, dims / 2]
    sin: ir.Value  # [positions, dims / 2]
    positions: ir.Value  # [b, s] int64, rows of the tables
    dims: int | None = None  # leading dimensions of a head that turn; None: all of them
    interleaved: bool = False  # pairs are (2i, 2i + 1), not (i, i + dims / 2)


class Dialect(Protocol):
    """Every operation's first node is called `name`, or something that begins with it."""

    def mask(self, position_ids: ir.Value, window: int | None = None) -> ir.Value:
        """What `attend` adds to scores: [b, 1, s, C], 0 where the cache position is visible, else
        -inf. Position c is visible to query p when c <= p and, with a window, p - c < window."""
        ...

    def cache_index(self, position_ids: ir.Value) -> ir.Value:
        """What `write_cache` of every layer needs to know of the positions."""
        ...

    def write_cache(
        self, name: str, past: ir.Value, new: ir.Value, index: ir.Value, *, output: str
    ) -> ir.Value:
        """`past` [b, kv_heads, C, head_dim] with `new` [b, kv_heads, s, head_dim] at this step's
        positions; the value is called `output`."""
        ...

    def rms_norm(self, name: str, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
        """weight * x / sqrt(mean(x^2) + epsilon) over the last axis, in float32; the weight is
        [n] or, one for each head of x [b, s, heads, n], [heads, n]."""
        ...

    def layer_norm(
        self, name: str, x: ir.Value, weight: ir.Value, bias: ir.Value | None, epsilon: float
    ) -> ir.Value:
        """weight * (x - mean(x)) / sqrt(var(x) + epsilon) [+ bias], like `rms_norm` otherwise."""
        ...

    def rotate(self, name: str, x: ir.Value, rotation: Rotation) -> ir.Value:
        """x [b, heads, s, head_dim], its pairs turned."""
        ...

    def attend(
        self,
        name: str,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        mask: ir.Value,
        *,
        scale: float,
        softcap: float | None = None,
    ) -> ir.Value:
        """softmax(cap(scale * q k^T) + mask) v [b, heads, s, head_dim], cap(x) being
        softcap * tanh(x / softcap) where it is given.

        q [b, heads, s, head_dim]; k, v [b, kv_heads, C, head_dim], heads / kv_heads queries for
        each; mask from `mask`.
        """
        ...

    def gelu(self, name: str, x: ir.Value, *, tanh: bool) -> ir.Value:
        """x * Phi(x), or its approximation by tanh."""
        ...
