"""Checkpoints whose e4m3 codes share a scale in squares (quant_method "fp8", as DeepSeek and Qwen
publish them; llm-compressor's FP8_BLOCK): the graph repeats each scale for the square's columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from remora_build.quantized.layout import FLOAT, Arrays, Layout, Piece, Shape, whole
from remora_build.quantized.matrix import Quantized
from remora_build.quantized.section import Scheme, Section, not_rounded
from remora_build.quantized.unpack import turned

SIDE = 128


def scheme(fields: Section) -> Scheme:
    """Raises Unsupported."""
    fields.only("fmt", "e4m3")
    fields.only("activation_scheme", "dynamic")
    check_square(fields, fields.take("weight_block_size"))
    fields.finish("quant_method", "modules_to_not_convert", "ignored_layers", "scale_fmt")
    return Scheme(layout("fp8", "weight_scale_inv"), False, not_rounded("dynamic input"))


def check_square(fields: Section, found: Any) -> None:
    """Raises Unsupported for blocks of another size."""
    if found != [SIDE, SIDE]:
        fields.refuse(f"blocks are {str(found)[:80]}", f"in blocks of {[SIDE, SIDE]}")


def layout(title: str, suffix: str) -> Layout:
    """`suffix`: what the scales [n / SIDE, k / SIDE], rounded up along n, are called."""

    def read(arrays: Arrays) -> Quantized:
        codes = turned(arrays["weight"])
        scales = np.repeat(arrays[suffix].astype(np.float32), SIDE, axis=0)
        return Quantized("fp8", codes, turned(scales[: codes.shape[1]]))

    def scale_shape(n: int, k: int) -> tuple[Shape, ...]:
        return () if k % SIDE else ((-(-n // SIDE), k // SIDE),)

    pieces = (Piece("weight", ("F8_E4M3",), whole), Piece(suffix, FLOAT, scale_shape))
    return Layout(f"{title} in blocks of {SIDE}", "fp8", SIDE, pieces, read)
