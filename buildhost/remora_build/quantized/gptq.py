"""Checkpoints of GPTQ (quant_method "gptq"): W = (q - z) * s with unsigned codes.

GPTQ smooths nothing, so adapters of the original model fit.
"""

from __future__ import annotations

import numpy as np

from remora_build.quantized.layout import FLOAT, Arrays, Layout, Piece, Shape
from remora_build.quantized.matrix import Quantized
from remora_build.quantized.section import Scheme, Section
from remora_build.quantized.unpack import centred, word_nibbles

_MIDDLE = 8  # the zero point of symmetric codes


def scheme(fields: Section) -> Scheme:
    """Raises Unsupported."""
    fields.only("bits", 4)
    fields.only("desc_act", False)
    fields.only("pack_dtype", "int32")
    fields.only("lm_head", False, True)
    symmetric = fields.only("sym", True, False)
    less_one = fields.only("checkpoint_format", "gptq", "gptq_v2") == "gptq"
    chosen = layout(fields.block("group_size"), symmetric=symmetric, zeros_less_one=less_one)
    fields.finish(*_IRRELEVANT)
    return Scheme(chosen, folded=False)


def layout(block: int, *, symmetric: bool, zeros_less_one: bool) -> Layout:
    """`zeros_less_one`: the file holds z - 1, as the first GPTQ format does."""

    def read(arrays: Arrays) -> Quantized:
        codes = centred(word_nibbles(arrays["qweight"], 0))
        _check_order(arrays, block)
        stored = word_nibbles(arrays["qzeros"], 1)
        zeros = ((stored + np.uint8(zeros_less_one)) & 0xF).view(np.int8)
        scales = arrays["scales"].astype(np.float32)
        if not symmetric:
            return Quantized("int4", codes, scales, offsets=np.int8(_MIDDLE) - zeros)
        if bool((zeros != _MIDDLE).any()):
            raise ValueError(f"is called symmetric, but its zero points are not all {_MIDDLE}")
        return Quantized("int4", codes, scales)

    def zeros_shape(n: int, k: int) -> tuple[Shape, ...]:
        return ((k // block, n // 8),)

    pieces = (
        Piece("qweight", ("I32",), lambda n, k: ((k // 8, n),)),
        Piece("qzeros", ("I32",), zeros_shape),
        Piece("scales", FLOAT, lambda n, k: ((k // block, n),)),
        Piece("g_idx", ("I32",), lambda n, k: ((k,),), optional=True),
    )
    return Layout("GPTQ", "int4", block, pieces, read, offsets=not symmetric)


def _check_order(arrays: Arrays, block: int) -> None:
    """Raises ValueError when neighbours along k do not share a scale."""
    index = arrays.get("g_idx")
    if index is not None and bool((index != np.arange(index.size) // block).any()):
        raise ValueError("is ordered by activation (desc_act); quantize with desc_act false")


_IRRELEVANT = """
    quant_method damp_percent static_groups true_sequential model_name_or_path model_file_base_name
    is_marlin_format quantizer meta dataset tokenizer model_seqlen block_name_to_quantize
    module_name_preceding_first_block batch_size pad_token_id use_cuda_fp16 cache_block_outputs
    modules_in_block_to_quantize backend exllama_config max_input_length act_group_aware format
""".split()  # noqa: SIM905
