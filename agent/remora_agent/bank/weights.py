"""An adapter's tensors in host memory, verified: every declared target present, shaped as declared,
finite, and nothing besides. The only way adapter bytes get into an engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remora_contract.targets import AdapterTarget, Projection

Factors = tuple[NDArray[np.floating], NDArray[np.floating]]


@dataclass(frozen=True)
class AdapterWeights:
    """`tensors[target] = (a [k, r], b [r, n])`, scale already in b; float16 or float32."""

    digest: str
    tensors: Mapping[AdapterTarget, Factors]

    @property
    def rank(self) -> int:
        """The most columns it takes in any projection."""
        return max(int(a.shape[1]) for a, _ in self.tensors.values())

    def rank_of(self, projection: Projection) -> int:
        """Largest rank over the layers; 0 when the projection is not adapted."""
        pairs = ((t, a) for t, (a, _) in self.tensors.items() if t.projection == projection)
        return max((int(a.shape[1]) for _, a in pairs), default=0)

    @property
    def bytes(self) -> int:
        return sum(a.nbytes + b.nbytes for a, b in self.tensors.values())
