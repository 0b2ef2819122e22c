"""Factors to the types other runtimes store, refused where a value does not fit. Pure."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.adapters.finite import all_finite
from remora_build.adapters.formats.registry import StoredDtype
from remora_contract.errors import AdapterInvalid


def numpy_dtype(dtype: StoredDtype) -> np.dtype[Any]:
    if dtype != "bfloat16":
        return np.dtype(dtype)
    import ml_dtypes

    bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return bfloat16


def cast(
    values: NDArray[np.float32], dtype: StoredDtype, where: str, *, remedy: str
) -> NDArray[Any]:
    """Rounded to nearest even, contiguous. Raises AdapterInvalid naming `where` and, when the
    values are too large for `dtype`, the `remedy`."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values, dtype=numpy_dtype(dtype))
    if all_finite(stored):
        return stored
    largest = float(np.abs(values).max())
    if not np.isfinite(largest):
        raise AdapterInvalid(f"{where} holds NaN or infinity; it would spoil every row of a batch")
    raise AdapterInvalid(f"{where} reaches {largest:.3g}, more than {dtype} holds; {remedy}")
