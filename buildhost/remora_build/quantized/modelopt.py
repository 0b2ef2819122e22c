"""Checkpoints of NVIDIA ModelOpt (hf_quant_config.json, quant_method "modelopt").

AWQ's and SmoothQuant's `pre_quant_scale` multiplies the module's input. With AWQ the export folds
it into the norms before q, k, v and before gate, up, and leaves it to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
    per_input,
    scalar,
    whole,
)
from remora_build.quantized.matrix import Quantized
from remora_build.quantized.section import INT4_BLOCKS, Scheme, Section, cache_note, not_rounded
from remora_build.quantized.unpack import byte_nibbles, powers_of_two, signed_nibbles, turned
from remora_contract.errors import CheckpointInvalid

_PRESCALE = Piece("pre_quant_scale", FLOAT, per_input, optional=True)
_INPUT_SCALE = Piece("input_scale", ("F32",), scalar, optional=True)


def scheme(fields: Section, group_size: Any) -> Scheme:
    """Of the quantization table; `group_size` is used where the table has none.

    Raises Unsupported, CheckpointInvalid.
    """
    algorithm = str(fields.take("quant_algo"))
    fields.only("has_zero_point", False)
    cache = fields.take("kv_cache_quant_algo") or fields.take("kv_cache_scheme")
    make = ALGORITHMS.get(algorithm)
    if make is None:
        fields.refuse(f"quant_algo is {algorithm[:80]!r}", "with " + ", ".join(ALGORITHMS))
    try:
        layout = make(algorithm, fields.take("group_size", group_size))
    except ValueError as e:
        raise CheckpointInvalid(f"{fields.where}: {e}") from e
    fields.finish(
        "pre_quant_scale", "exclude_modules", "ignore", "config_groups", "producer", "quant_method"
    )
    notes = not_rounded(algorithm) if algorithm in _ROUNDS_INPUTS else {}
    if cache:
        notes |= cache_note(cache)
    # Where the config promises a scale and a module has none, a norm has it.
    folded = algorithm.endswith("_AWQ")
    return Scheme(layout, folded, notes, ("k_scale", "v_scale") if cache else ())


def _nvfp4(algorithm: str, group_size: Any) -> Layout:
    _fixed(group_size, 16)
    pieces = (
        Piece("weight", ("U8",), lambda n, k: ((n, k // 2),)),
        Piece("weight_scale", ("F8_E4M3",), per_block(16)),
        Piece("weight_scale_2", ("F32",), scalar),
        _INPUT_SCALE,
        _PRESCALE,
    )
    return Layout(
        f"ModelOpt {algorithm}",
        "nvfp4",
        16,
        pieces,
        _read_nvfp4,
        prescale="pre_quant_scale",
        global_scale="weight_scale_2",
    )


def _read_nvfp4(arrays: Arrays) -> Quantized:
    codes = turned(byte_nibbles(arrays["weight"], 1))
    whole_scale = float(arrays["weight_scale_2"].reshape(-1)[0])
    return Quantized("nvfp4", codes, turned(arrays["weight_scale"]), whole_scale)


def _mxfp8(algorithm: str, group_size: Any) -> Layout:
    _fixed(group_size, 32)
    pieces = (
        Piece("weight", ("F8_E4M3",), whole),
        Piece("weight_scale", ("U8", "F8_E8M0"), per_block(32)),
    )
    return Layout(f"ModelOpt {algorithm}", "mxfp8", 32, pieces, _read_mxfp8)


def _read_mxfp8(arrays: Arrays) -> Quantized:
    scales = powers_of_two(turned(arrays["weight_scale"]))
    return Quantized("mxfp8", turned(arrays["weight"]), scales)


def _fp8(algorithm: str, group_size: Any) -> Layout:
    pieces = (
        Piece("weight", ("F8_E4M3",), whole),
        Piece("weight_scale", FLOAT, _scalar_or_column),
        Piece("input_scale", ("F32",), scalar),
    )
    return Layout(
        f"ModelOpt {algorithm}",
        "fp8",
        None,
        pieces,
        _read_fp8,
        activations="fp8",
        input_scale="input_scale",
    )


def _fp8_channel(algorithm: str, group_size: Any) -> Layout:
    pieces = (
        Piece("weight", ("F8_E4M3",), whole),
        Piece("weight_scale", FLOAT, per_column),
    )
    return Layout(f"ModelOpt {algorithm}", "fp8", None, pieces, _read_fp8)


def _read_fp8(arrays: Arrays) -> Quantized:
    scales = column_scales(arrays["weight_scale"], len(arrays["weight"]))
    return Quantized("fp8", turned(arrays["weight"]), scales)


def _int4_awq(algorithm: str, group_size: Any) -> Layout:
    if type(group_size) is not int or group_size not in INT4_BLOCKS:
        raise ValueError(f"group_size is {str(group_size)[:80]!r}, not one of {INT4_BLOCKS}")
    pieces = (
        Piece("weight", ("U8",), lambda n, k: ((n // 2, k),)),
        Piece("weight_scale", FLOAT, per_block(group_size)),
        _PRESCALE,
    )
    return Layout(
        f"ModelOpt {algorithm}", "int4", group_size, pieces, _read_int4, prescale="pre_quant_scale"
    )


def _read_int4(arrays: Arrays) -> Quantized:
    codes = turned(signed_nibbles(byte_nibbles(arrays["weight"], 0)))
    return Quantized("int4", codes, block_scales(arrays["weight_scale"]))


def _smoothquant(algorithm: str, group_size: Any) -> Layout:
    pieces = (
        Piece("weight", ("I8",), whole),
        Piece("weight_scale", FLOAT, per_column),
        Piece("input_scale", ("F32",), scalar),
        _PRESCALE,
    )
    return Layout(
        f"ModelOpt {algorithm}",
        "int8",
        None,
        pieces,
        _read_int8,
        activations="int8",
        prescale="pre_quant_scale",
        input_scale="input_scale",
    )


def _int8(algorithm: str, group_size: Any) -> Layout:
    pieces = (
        Piece("weight", ("I8",), whole),
        Piece("weight_scale", FLOAT, per_column),
    )
    return Layout(f"ModelOpt {algorithm}", "int8", None, pieces, _read_int8)


def _read_int8(arrays: Arrays) -> Quantized:
    scales = column_scales(arrays["weight_scale"], len(arrays["weight"]))
    return Quantized("int8", turned(arrays["weight"]), scales)


def _scalar_or_column(n: int, k: int) -> tuple[Shape, ...]:
    return (*scalar(n, k), *per_column(n, k))


def _fixed(group_size: Any, block: int) -> None:
    """Absent, or the format's own. Raises ValueError."""
    if group_size not in (None, block):
        raise ValueError(f"group_size is {group_size!r}, the format has {block}")


ALGORITHMS: dict[str, Callable[[str, Any], Layout]] = {
    "NVFP4": _nvfp4,
    "NVFP4_AWQ": _nvfp4,
    "W4A16_NVFP4": _nvfp4,
    "MXFP8": _mxfp8,
    "FP8": _fp8,
    "FP8_PER_CHANNEL_PER_TOKEN": _fp8_channel,
    "W4A16_AWQ": _int4_awq,
    "W8A8_SQ_PER_CHANNEL": _smoothquant,
    "W8A16": _int8,
}
_ROUNDS_INPUTS = ("NVFP4", "NVFP4_AWQ", "MXFP8", "FP8_PER_CHANNEL_PER_TOKEN")
