"""A quantized matrix in the graph's orientation, whoever made it. Pure numpy.

    W[i, j] = (value(codes[i, j]) + offsets[b, j]) * scales[b, j] * global_scale     b = i / block

`value` is the code itself (int4, int8), the e4m3 number (fp8, mxfp8) or the e2m1 number (nvfp4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from remora_build.graph.forms import Kind

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = np.array(
    [sign * v for sign in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32
)
_E4M3_NAN = 0x7F  # without the sign
LARGEST: dict[Kind, float] = {
    "int4": 8.0,
    "int8": 128.0,
    "fp8": E4M3_MAX,
    "mxfp8": E4M3_MAX,
    "nvfp4": E2M1_MAX,
}


@dataclass(frozen=True)
class Quantized:
    """`codes` [k, n] int8 (int4, int8) or uint8 bits; `scales` [k / block, n] float32, of nvfp4 the
    bits of e4m3; `offsets` [k / block, n] int8."""

    kind: Kind
    codes: NDArray[Any]
    scales: NDArray[Any]
    global_scale: float = 1.0
    offsets: NDArray[np.int8] | None = None

    def columns(self, begin: int, end: int) -> Quantized:
        """Only columns `begin` to `end` of the matrix."""
        part = slice(begin, end)
        offsets = None if self.offsets is None else self.offsets[:, part]
        return Quantized(
            self.kind, self.codes[:, part], self.scales[:, part], self.global_scale, offsets
        )


def values(kind: Kind, codes: NDArray[Any]) -> NDArray[np.float32]:
    """What the codes stand for, unscaled."""
    if kind == "nvfp4":
        return np.asarray(E2M1_VALUES[codes])
    if kind in ("fp8", "mxfp8"):
        return np.asarray(codes.view(E4M3), np.float32)
    return codes.astype(np.float32)


def scale_values(packed: Quantized) -> NDArray[np.float32]:
    """[k / block, n] float32, the global scale not in it."""
    if packed.kind == "nvfp4":
        return np.asarray(packed.scales.view(E4M3), np.float32)
    return np.asarray(packed.scales, np.float32)


def dequantize(packed: Quantized) -> NDArray[np.float32]:
    """[k, n]: what an engine computes with."""
    k, n = packed.codes.shape
    scale = scale_values(packed)
    blocks = values(packed.kind, packed.codes).reshape(len(scale), -1, n)
    if packed.offsets is not None:
        blocks = blocks + packed.offsets[:, None].astype(np.float32)
    wide = blocks * (scale * np.float32(packed.global_scale))[:, None]
    return np.asarray(wide, np.float32).reshape(k, n)


def problem(packed: Quantized, dtype: np.dtype[Any]) -> str | None:
    """Why an engine could not compute with it in `dtype`; None if it can."""
    if packed.kind in ("fp8", "mxfp8") and bool(((packed.codes & 0x7F) == _E4M3_NAN).any()):
        return "holds NaN codes; the checkpoint is damaged"
    scale = scale_values(packed) * np.float32(packed.global_scale)
    if not bool(np.isfinite(scale).all()) or bool((scale < 0).any()):
        return "has scales that are negative or not finite; the checkpoint is damaged"
    largest = float(scale.max()) * LARGEST[packed.kind] if scale.size else 0.0
    if dtype == np.float16 and largest > float(np.finfo(np.float16).max):
        return "has values beyond float16's range (65504); export with --dtype float32"
    return None


def rounded_scales(packed: Quantized, dtype: np.dtype[Any]) -> Quantized:
    """The same matrix with scales that `dtype` holds, all above zero, as TensorRT wants them.

    Where a scale is zero or rounds to it, the codes become zero: no such weight was above
    2^-25 * LARGEST. Scales of nvfp4 stay as they are, for its global scale is float32.
    """
    if packed.kind == "nvfp4":
        return packed
    scales = np.asarray(packed.scales, np.float32).astype(dtype)
    zero = scales == 0
    if not bool(zero.any()):
        return Quantized(packed.kind, packed.codes, scales, packed.global_scale, packed.offsets)
    scales[zero] = 1
    k, n = packed.codes.shape
    codes = packed.codes.reshape(len(scales), -1, n).copy()
    np.copyto(codes, np.zeros((), codes.dtype), where=zero[:, None])
    offsets = None if packed.offsets is None else np.where(zero, np.int8(0), packed.offsets)
    return Quantized(packed.kind, codes.reshape(k, n), scales, packed.global_scale, offsets)
