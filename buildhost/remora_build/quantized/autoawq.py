"""Checkpoints of AutoAWQ (quant_method "awq", version "gemm"): W = (q - z) * s with unsigned codes.

AutoAWQ has folded its smoothing into norms and into the projections before.
"""

from __future__ import annotations

import numpy as np

from remora_build.quantized.layout import FLOAT, Arrays, Layout, Piece
from remora_build.quantized.matrix import Quantized
from remora_build.quantized.section import Scheme, Section
from remora_build.quantized.unpack import awq_nibbles, centred

_MIDDLE = 8  # the zero point of symmetric codes


def scheme(fields: Section) -> Scheme:
    """Raises Unsupported."""
    fields.only("bits", 4)
    fields.only("w_bit", 4)
    fields.only("zero_point", True)
    fields.only("version", "gemm", "GEMM")
    block = fields.block("group_size" if fields.has("group_size") else "q_group_size")
    fields.finish(
        "quant_method", "backend", "fuse_max_seq_len", "modules_to_not_convert", "modules_to_fuse"
    )
    return Scheme(layout(block), folded=True)


def layout(block: int) -> Layout:
    pieces = (
        Piece("qweight", ("I32",), lambda n, k: ((k, n // 8),)),
        Piece("qzeros", ("I32",), lambda n, k: ((k // block, n // 8),)),
        Piece("scales", FLOAT, lambda n, k: ((k // block, n),)),
    )
    return Layout("AutoAWQ", "int4", block, pieces, _read, offsets=True)


def _read(arrays: Arrays) -> Quantized:
    codes = centred(awq_nibbles(arrays["qweight"]))
    zeros = awq_nibbles(arrays["qzeros"]).view(np.int8)
    scales = arrays["scales"].astype(np.float32)
    return Quantized("int4", codes, scales, offsets=np.int8(_MIDDLE) - zeros)
