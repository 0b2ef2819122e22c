"""The algebra of one target: PEFT's factors to the bank's, scale folded.

    PEFT:    y += scaling * (x A^T) B^T      A [r, k]   B [n, r]
    Remora:  y += (x a) b                    a = A^T [k, r]   b = scaling * B^T [r, n]

in float32, whatever the factors were stored in. Pure; the orientation is PEFT's convention and
never read off a shape, so rank = k = n is no special case.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.binding import Binding
from remora_build.adapters.sidecar import Factor
from remora_contract.errors import AdapterInvalid


def fold(binding: Binding, lora_a: NDArray[np.float32], lora_b: NDArray[np.float32]) -> Factor:
    """`lora_a` [r, k], `lora_b` [n, r]; a of the factor is a view of it.

    Raises AdapterInvalid naming a tensor that is not finite.
    """
    _check_finite(lora_a, binding.tensor_a)
    _check_finite(lora_b, binding.tensor_b)
    with np.errstate(over="ignore"):
        b = lora_b.T * np.float32(binding.scaling)
    if not np.isfinite(b).all():
        raise AdapterInvalid(f"{binding.tensor_b}: times {binding.scaling} it leaves float32")
    return Factor(lora_a.T, b, binding.scaling)


def _check_finite(values: NDArray[np.float32], name: str) -> None:
    """0 * inf is NaN: one such number would spoil the rows that do not even use the adapter."""
    if not np.isfinite(values).all():
        raise AdapterInvalid(f"tensor {name} holds NaN or infinity; the adapter is damaged")
