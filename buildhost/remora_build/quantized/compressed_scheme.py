"""The config of llm-compressor's checkpoints: one scheme for all modules is read. Smoothing that a
recipe folded into norms leaves no trace in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from remora_build.quantized import compressed, fp8
from remora_build.quantized.layout import Layout
from remora_build.quantized.section import (
    INT4_BLOCKS,
    Scheme,
    Section,
    cache_note,
    not_rounded,
)


def scheme(fields: Section) -> Scheme:
    """Raises Unsupported: one scheme for all modules is read, its rotations (transform_config) and
    sparsity are not."""
    fields.only("quantization_status", "compressed", "frozen")
    outer = fields.take("format")
    cache = fields.take("kv_cache_scheme")
    groups = fields.table("config_groups")
    schemes = groups.tables() if groups else []
    if not schemes or not all(s.same_as(schemes[0], "targets") for s in schemes):
        fields.refuse(
            f"{len(schemes)} config_groups that differ", "with one scheme for all modules"
        )
    fields.finish("quant_method", "global_compression_ratio", "ignore", "version", "producer")
    chosen, notes = _group(schemes[0], outer)
    if cache:
        notes |= cache_note("kv_cache_scheme")
    return Scheme(chosen, None, notes, ("k_scale", "v_scale") if cache else ())


def _group(fields: Section, outer: Any) -> tuple[Layout, dict[str, str]]:
    weights = fields.table("weights")
    if weights is None:
        fields.refuse("weights are not described", "with a scheme for weights")
    inputs, form = fields.table("input_activations"), fields.take("format", outer)
    if fields.take("output_activations") is not None:
        fields.refuse("output_activations are rounded", "without output_activations")
    fields.finish("targets")
    weights.only("dynamic", False)
    weights.only("actorder", "none", "weight", "static")
    words = _Weights(
        bits=weights.only("num_bits", 8, 4),
        kind=weights.only("type", "int", "float"),
        symmetric=weights.only("symmetric", True, False),
        strategy=str(weights.take("strategy")),
        block=weights.take("group_size"),
    )
    if words.strategy == "block":
        fp8.check_square(weights, weights.take("block_structure"))
    weights.finish("observer", "observer_kwargs", "scale_dtype", "zp_dtype")
    static, notes = _inputs(inputs)
    made = _layout(words, str(form), static)
    if made is None or (not words.symmetric and not made.offsets):
        fields.refuse(f"{words} as {form!r}", "to one of the forms of docs/quantization.md")
    if static and made.activations == "none":
        notes = not_rounded("static input")
    return made, notes


@dataclass(frozen=True)
class _Weights:
    bits: int
    kind: str
    symmetric: bool
    strategy: str
    block: Any


def _inputs(fields: Section | None) -> tuple[bool, dict[str, str]]:
    """(whether inputs are rounded at a static scale, notes)."""
    if fields is None:
        return False, {}
    fields.only("symmetric", True)
    fields.only("num_bits", 8, 4)
    dynamic = fields.only("dynamic", False, True, "local")
    strategy = fields.take("strategy")
    fields.finish(
        "type", "group_size", "observer", "observer_kwargs", "scale_dtype", "zp_dtype", "actorder"
    )
    static = dynamic is False and strategy in (None, "tensor")
    return static, {} if static else not_rounded(f"{strategy} input")


def _layout(w: _Weights, form: str, static: bool) -> Layout | None:
    channel, group = w.strategy == "channel", w.strategy == "group"
    if form == "pack-quantized" and w.kind == "int":
        if w.bits == 4 and group and w.block in INT4_BLOCKS:
            return compressed.packed(4, w.block, symmetric=w.symmetric)
        if w.bits == 8 and w.symmetric and (channel or (group and w.block in INT4_BLOCKS)):
            return compressed.packed(8, w.block if group else None, symmetric=True)
    plain = form == "naive-quantized"
    if (plain or form == "int-quantized") and (w.kind, w.bits) == ("int", 8):
        carried = channel or (group and w.block in INT4_BLOCKS and not static)
        block = w.block if group else None
        return compressed.integers(block=block, static_input=static) if carried else None
    if (plain or form == "float-quantized") and (w.kind, w.bits) == ("float", 8):
        if w.strategy == "block" and not static:
            return fp8.layout("compressed-tensors float-quantized", "weight_scale")
        whole = channel or w.strategy == "tensor"
        return compressed.floats(static_input=static) if whole else None
    if form == "nvfp4-pack-quantized" and w.kind == "float" and w.block == 16:
        return compressed.nvfp4()
    return (
        compressed.mxfp8()
        if form == "mxfp8-quantized" and w.kind == "float" and w.block == 32
        else None
    )
