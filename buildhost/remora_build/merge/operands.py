"""Factors as they are needed beside a stored weight: W += left @ right, scale in `left`.

Owns the cutting of A and B for one tensor or one expert, and how long factors stay in memory.
Everything is float32.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.finite import all_finite
from remora_build.merge.changes import LowRank, Shift
from remora_contract.errors import AdapterInvalid

F32 = NDArray[np.float32]
_KEPT_BYTES = 256 << 20


class Weights(Protocol):
    """What is read of an adapter's file (`adapters.weights.PeftWeights`)."""

    def float32(self, name: str) -> F32: ...


@dataclass(frozen=True)
class Operands:
    """left [rows, t], right [t, columns]; t is the sum of the adapters' ranks."""

    left: F32
    right: F32


class Loader:
    """`adapters[i]` are the weights of adapter i. For one thread. Raises AdapterInvalid for a
    tensor that is not finite."""

    def __init__(self, adapters: Sequence[Weights]) -> None:
        self._adapters = adapters
        self._kept: OrderedDict[tuple[int, str], F32] = OrderedDict()

    def operands(self, products: Sequence[LowRank], block: int = 0) -> Operands:
        """`block`: which expert, for a tensor that stacks them."""
        pairs = [self._cut(product, block) for product in products]
        left = np.concatenate([left for left, _ in pairs], axis=1)
        right = np.concatenate([right for _, right in pairs], axis=0)
        return Operands(left, right)

    def shift(self, shifts: Sequence[Shift]) -> F32:
        """Σ scale · vector."""
        total: F32 = np.zeros(1, np.float32)
        for s in shifts:
            total = total + self.tensor(s.adapter, s.tensor) * np.float32(s.scale)
        return total

    def tensor(self, adapter: int, name: str) -> F32:
        """A whole tensor."""
        values = self._adapters[adapter].float32(name)
        if not all_finite(values):
            raise AdapterInvalid(f"tensor {name} holds NaN or infinity; the adapter is damaged")
        return values

    def _cut(self, product: LowRank, block: int) -> tuple[F32, F32]:
        read = self.tensor if product.experts is None else self._stacked
        a, b = read(product.adapter, product.a), read(product.adapter, product.b)
        experts = product.experts
        if experts is not None:
            expert = block if experts.index is None else experts.index
            first, last = experts.rows
            a = a[expert * product.rank : (expert + 1) * product.rank]
            b = b[first:last, expert :: experts.count]
        scale = np.float32(product.scale)
        return (a.T * scale, b.T) if product.transposed else (b * scale, a)

    def _stacked(self, adapter: int, name: str) -> F32:
        """Factors of stacked experts are kept: the next expert needs them again. The longest
        unused go first, never the two that one product needs."""
        key = adapter, name
        if key not in self._kept:
            self._kept[key] = self.tensor(adapter, name)
        self._kept.move_to_end(key)
        while len(self._kept) > 2 and sum(v.nbytes for v in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[key]
