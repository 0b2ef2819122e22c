"""What the person asked for, and the GraphSpec it means for a given decoder. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from remora_build.families.shape import used_groups, used_projections
from remora_build.graph.ops import opset_of
from remora_contract.bundle import DecoderSpec, GraphDialect, GraphSpec, QuantSpec
from remora_contract.errors import RequestInvalid, Unsupported
from remora_contract.targets import PARTS

DEFAULT_CONTEXT = 4096
INT4_BLOCKS = (32, 128)
Adapt = Literal["embed", "head", "experts"]


@dataclass(frozen=True)
class ExportOptions:
    dtype: Literal["float16", "float32"] = "float16"
    int4_block: int | None = None  # None: weights stay in dtype
    max_context: int | None = None  # None: the checkpoint's limit, at most DEFAULT_CONTEXT
    max_bank_rank: int = 64
    dialect: GraphDialect = "native"
    golden: bool = True
    golden_file: Path | None = None  # None: built-in sentences
    # What adapters may change beyond the layers' dense projections, and beyond A and B.
    adapt: tuple[Adapt, ...] = ()
    dora: bool = False
    adapter_bias: bool = False


def graph_spec(spec: DecoderSpec, options: ExportOptions) -> GraphSpec:
    """Raises RequestInvalid, Unsupported for what this decoder or version cannot do."""
    quant = _quant(spec, options.int4_block)
    if options.dialect == "legacy" and quant.kind == "int4":
        _refuse_odd_rows(spec)
    return GraphSpec(
        dialect=options.dialect,
        dtype=options.dtype,
        context=_context(spec, options.max_context),
        max_bank_rank=options.max_bank_rank,
        opset=opset_of(options.dialect, quant),
        quant=quant,
        adapt=_adapt(spec, options),
        dora=options.dora,
        adapter_bias=options.adapter_bias,
    )


def _adapt(spec: DecoderSpec, options: ExportOptions) -> tuple[Adapt, ...]:
    """In the order of `Adapt`, each once. Raises RequestInvalid for what could never be used."""
    if not options.max_bank_rank and (options.adapt or options.dora or options.adapter_bias):
        raise RequestInvalid(
            "--adapt, --dora and --adapter-bias need adapters: give --max-bank-rank"
        )
    if "experts" in options.adapt and spec.experts is None:
        raise RequestInvalid("--adapt experts: this checkpoint has no experts")
    return tuple(part for part in get_args(Adapt) if part in options.adapt)


def _context(spec: DecoderSpec, wanted: int | None) -> int:
    if wanted is None:
        return min(spec.max_position, DEFAULT_CONTEXT)
    if not 1 <= wanted <= spec.max_position:
        raise RequestInvalid(
            f"--max-context {wanted}: the checkpoint was made for 1 to {spec.max_position} tokens"
        )
    return wanted


def _quant(spec: DecoderSpec, block: int | None) -> QuantSpec:
    if block is None:
        return QuantSpec()
    if block not in INT4_BLOCKS:
        raise Unsupported(f"--int4-block {block}: use one of {INT4_BLOCKS}")
    for projection in used_projections(spec):
        k = spec.in_features(projection)
        if k % block:
            hint = _other_block(spec)
            raise Unsupported(
                f"--int4-block {block} does not divide the {k} inputs of the {projection} "
                f"projection; {hint}"
            )
    return QuantSpec("int4", block)


def _refuse_odd_rows(spec: DecoderSpec) -> None:
    """TensorRT 10.3 packs INT4 along the last dimension and takes no odd one."""
    widths = {g: sum(spec.out_features(p) for p in PARTS[g]) for g in used_groups(spec)}
    widths |= {"head": spec.vocab}
    for name, width in widths.items():
        if width % 2:
            raise Unsupported(
                f"{name} has {width} outputs and TensorRT 10.3 takes int4 weights only with an "
                "even number; export it without --int4-block"
            )


def _other_block(spec: DecoderSpec) -> str:
    for block in INT4_BLOCKS:
        if all(spec.in_features(p) % block == 0 for p in used_projections(spec)):
            return f"use --int4-block {block}"
    return "export it without --int4-block"
