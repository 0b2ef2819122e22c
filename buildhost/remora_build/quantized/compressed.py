"""The layouts of llm-compressor's checkpoints (quant_method "compressed-tensors")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from remora_build.graph.forms import Kind
from remora_build.quantized.layout import (
    FLOAT,
    Arrays,
    Layout,
    Piece,
    Shape,
    block_scales,
    column_scales,
    per_block,
    per_column,
    scalar,
    whole,
)
from remora_build.quantized.matrix import Quantized
from remora_build.quantized.unpack import (
    byte_nibbles,
    centred,
    powers_of_two,
    turned,
    word_bytes,
    word_nibbles,
)

_SHAPE = Piece("weight_shape", ("I64", "I32"), lambda n, k: ((2,),))
_TITLE = "compressed-tensors"


def packed(bits: int, block: int | None, *, symmetric: bool) -> Layout:
    """pack-quantized: 4- or 8-bit codes in 32-bit words along k, zero points along n."""
    per_word = 32 // bits
    kind: Kind = "int4" if bits == 4 else "int8"

    def read(arrays: Arrays) -> Quantized:
        _check_shape(arrays, per_word)
        words = arrays["weight_packed"]
        if bits == 4:
            codes = centred(word_nibbles(words, 1))
        else:
            codes = word_bytes(words).view(np.int8) ^ np.int8(-128)  # 128 was added
        scales = block_scales(arrays["weight_scale"])
        if symmetric:
            return Quantized(kind, turned(codes), scales)
        zeros = centred(word_nibbles(arrays["weight_zero_point"], 0))
        return Quantized(kind, turned(codes), scales, offsets=turned(-zeros))

    def zeros_shape(n: int, k: int) -> tuple[Shape, ...]:
        return ((n // 8, 1 if block is None else k // block),)

    pieces = [
        Piece("weight_packed", ("I32",), lambda n, k: ((n, k // per_word),)),
        Piece("weight_scale", FLOAT, per_column if block is None else per_block(block)),
        _SHAPE,
    ]
    if not symmetric:
        pieces.append(Piece("weight_zero_point", ("I32",), zeros_shape))
    title = f"{_TITLE} pack-quantized"
    return Layout(title, kind, block, tuple(pieces), read, offsets=not symmetric)


def _check_shape(arrays: Arrays, per_word: int) -> None:
    """Raises ValueError when the recorded shape is not that of the words."""
    n, words = arrays["weight_packed"].shape
    if arrays["weight_shape"].tolist() != [n, words * per_word]:
        raise ValueError(f"has weight_shape {arrays['weight_shape'].tolist()}")


def integers(*, block: int | None, static_input: bool) -> Layout:
    """int-quantized: 8-bit codes as they are."""
    pieces = [
        Piece("weight", ("I8",), whole),
        Piece("weight_scale", FLOAT, per_column if block is None else per_block(block)),
    ]
    return _with_input(f"{_TITLE} int-quantized", "int8", block, pieces, _read_int8, static_input)


def _read_int8(arrays: Arrays) -> Quantized:
    n, scale = len(arrays["weight"]), arrays["weight_scale"]
    scales = block_scales(scale) if scale.ndim == 2 else column_scales(scale, n)
    return Quantized("int8", turned(arrays["weight"]), scales)


def floats(*, static_input: bool) -> Layout:
    """float-quantized: e4m3 codes, one scale for all or for each output."""
    pieces = [
        Piece("weight", ("F8_E4M3",), whole),
        Piece("weight_scale", FLOAT, lambda n, k: (*scalar(n, k), *per_column(n, k))),
    ]
    return _with_input(f"{_TITLE} float-quantized", "fp8", None, pieces, _read_fp8, static_input)


def _read_fp8(arrays: Arrays) -> Quantized:
    scales = column_scales(arrays["weight_scale"], len(arrays["weight"]))
    return Quantized("fp8", turned(arrays["weight"]), scales)


def _with_input(
    title: str,
    kind: Any,
    block: int | None,
    pieces: list[Piece],
    read: Callable[[Arrays], Quantized],
    static_input: bool,
) -> Layout:
    if not static_input:
        return Layout(title, kind, block, tuple(pieces), read)
    inputs = Piece("input_scale", FLOAT, scalar)
    return Layout(
        title,
        kind,
        block,
        (*pieces, inputs),
        read,
        activations=kind,
        input_scale="input_scale",
    )


def nvfp4() -> Layout:
    """nvfp4-pack-quantized: the global scale divides."""
    pieces = (
        Piece("weight_packed", ("U8",), lambda n, k: ((n, k // 2),)),
        Piece("weight_scale", ("F8_E4M3",), per_block(16)),
        Piece("weight_global_scale", ("F32",), scalar),
        Piece("input_global_scale", ("F32",), scalar, optional=True),
    )
    return Layout(
        f"{_TITLE} nvfp4-pack-quantized",
        "nvfp4",
        16,
        pieces,
        _read_nvfp4,
        global_scale="weight_global_scale",
    )


def _read_nvfp4(arrays: Arrays) -> Quantized:
    codes = turned(byte_nibbles(arrays["weight_packed"], 1))
    divisor = np.float32(arrays["weight_global_scale"].reshape(-1)[0])
    if not divisor > 0:
        raise ValueError(f"has the global scale {divisor}")
    whole_scale = float(np.float32(1) / divisor)
    return Quantized("nvfp4", codes, turned(arrays["weight_scale"]), whole_scale)


def mxfp8() -> Layout:
    pieces = (
        Piece("weight", ("F8_E4M3",), whole),
        Piece("weight_scale", ("U8", "F8_E8M0"), per_block(32)),
    )
    return Layout(f"{_TITLE} mxfp8-quantized", "mxfp8", 32, pieces, _read_mxfp8)


def _read_mxfp8(arrays: Arrays) -> Quantized:
    scales = powers_of_two(turned(arrays["weight_scale"]))
    return Quantized("mxfp8", turned(arrays["weight"]), scales)
