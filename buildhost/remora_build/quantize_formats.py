"""Quantization without calibration: float weights [k, n] -> codes and scales. Pure numpy.

    int8    scale[j] = max|w[:, j]| / 127
    mxfp8   scale[b, j] = the least power of two with max|w| / scale <= 448
    nvfp4   global = max|w| / (6 * 448)    scale[b, j] = e4m3(max|w of the block| / (6 * global))

Codes are the nearest, ties to even. mxfp8 and nvfp4 are bit for bit what NVIDIA ModelOpt makes of
the same weights; a packed projection shares one `global`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from remora_build.quantized.matrix import E2M1_MAX, E4M3, E4M3_MAX, Quantized

MXFP8_BLOCK = 32
NVFP4_BLOCK = 16
_INT8_MAX = 127.0
_LEAST_E4M3 = 2.0**-9
# Between neighbours of e2m1, and whether the even one is above.
_E2M1_MIDDLES = tuple(
    (np.float32(m), i % 2 == 1) for i, m in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5))
)
_PANEL = 1 << 17  # weights at once: they stay in the processor's cache
_E8M0_RANGE = (-126, 127)  # 2^-127 is no normal float32


def int8(weight: NDArray[Any]) -> Quantized:
    """One scale a column."""
    w = weight.astype(np.float32)
    scale = _above_zero(np.abs(w).max(axis=0, keepdims=True) / np.float32(_INT8_MAX))
    codes = np.rint(w / scale).astype(np.int8)
    return Quantized("int8", codes, scale)


def mxfp8(weight: NDArray[Any]) -> Quantized:
    """k is a multiple of MXFP8_BLOCK."""
    blocks = _blocks(weight, MXFP8_BLOCK)
    ratio = np.abs(blocks).max(axis=1) / np.float32(E4M3_MAX)
    mantissa, exponent = np.frexp(ratio)  # ratio = mantissa * 2^exponent, mantissa in [0.5, 1)
    least = np.where(ratio == 0, 0, np.where(mantissa == 0.5, exponent - 1, exponent))
    scale = np.exp2(np.clip(least, *_E8M0_RANGE)).astype(np.float32)
    codes = np.clip(blocks / scale[:, None], -E4M3_MAX, E4M3_MAX).astype(E4M3)
    return Quantized("mxfp8", codes.view(np.uint8).reshape(weight.shape), scale)


def nvfp4_global(largest: float) -> float:
    """The global scale for weights of which `largest` is the largest magnitude."""
    scale = np.float32(largest) / np.float32(E2M1_MAX * E4M3_MAX)
    return float(scale) or 1.0


def nvfp4(weight: NDArray[Any], global_scale: float) -> Quantized:
    """k is a multiple of NVFP4_BLOCK."""
    k, n = weight.shape
    blocks, whole = weight.reshape(-1, NVFP4_BLOCK, n), np.float32(global_scale)
    codes = np.empty(blocks.shape, np.uint8)
    scales = np.empty((len(blocks), n), np.uint8)
    rows = max(1, _PANEL // (NVFP4_BLOCK * n))
    for first in range(0, len(blocks), rows):
        here = slice(first, first + rows)
        panel = blocks[here].astype(np.float32)
        wanted = _above_zero(np.abs(panel).max(axis=1) / (np.float32(E2M1_MAX) * whole))
        scale = np.clip(wanted, _LEAST_E4M3, E4M3_MAX).astype(E4M3)
        scales[here] = scale.view(np.uint8)
        codes[here] = e2m1_codes(panel / (scale.astype(np.float32) * whole)[:, None])
    return Quantized("nvfp4", codes.reshape(k, n), scales, global_scale)


def e2m1_codes(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The nearest e2m1 code 0..15, ties to the even one; what is past 6 becomes 6."""
    a = np.abs(x)
    codes: NDArray[np.uint8] = (x < 0).view(np.uint8) << np.uint8(3)
    for middle, upward in _E2M1_MIDDLES:
        codes += np.greater_equal(a, middle) if upward else np.greater(a, middle)
    return codes


def _blocks(weight: NDArray[Any], block: int) -> NDArray[np.float32]:
    """[k / block, block, n]"""
    return weight.astype(np.float32).reshape(-1, block, weight.shape[1])


def _above_zero(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Where all weights are zero any scale will do."""
    return np.where(scale == 0, np.float32(1), scale)
