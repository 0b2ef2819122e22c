"""Whether all numbers of an array are finite. Pure."""

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
        return bool(np.isfinite(values).all())
    bits = values.view(np.uint16) & np.uint16(exponent)
    return bits.size == 0 or int(bits.max()) != exponent
