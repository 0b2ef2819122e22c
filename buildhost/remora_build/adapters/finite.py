"""Whether all numbers of an array are finite, without a copy of it. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_EXPONENT = {"float16": 0x7C00, "bfloat16": 0x7F80}


def all_finite(values: NDArray[Any]) -> bool:
    """numpy tests half precision number by number; its bits are looked at instead: infinity and NaN
    are those with every bit of the exponent set. Any float type; contiguous where it is half."""
    exponent = _EXPONENT.get(values.dtype.name)
    if exponent is None:
        return bool(np.isfinite(largest(values)))
    bits = values.view(np.uint16) & np.uint16(exponent)
    return bits.size == 0 or int(bits.max()) != exponent


def largest(values: NDArray[Any]) -> float:
    """The greatest magnitude; NaN or infinity when any number is. 0 of nothing."""
    if not values.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        return max(float(values.max()), -float(values.min()))
