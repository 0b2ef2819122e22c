"""What the person asked for, and the GraphSpec it means for a given decoder. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from remora_build import quantize_formats
from remora_build.families.shape import used_groups, used_projections
from remora_build.graph.ops import opset_of
from remora_contract.bundle import GraphDialect, GraphSpec, QuantSpec
from remora_contract.decoder import DecoderSpec
from remora_contract.errors import RequestInvalid, Unsupported
from remora_contract.targets import PARTS, Projection

DEFAULT_CONTEXT = 4096
INT4_BLOCKS = (32, 128)
Adapt = Literal["embed", "head", "experts"]
MadeQuant = Literal["int4", "int8", "mxfp8", "nvfp4"]
_BLOCKS: dict[MadeQuant, int | None] = {
    "int8": None,
    "mxfp8": quantize_formats.MXFP8_BLOCK,
    "nvfp4": quantize_formats.NVFP4_BLOCK,
}
_DEFAULT_INT4_BLOCK = 32
# The head keeps the graph's dtype in these, as the tools that invented them do.
_PLAIN_HEAD = ("mxfp8", "nvfp4")


@dataclass(frozen=True)
class ExportOptions:
    dtype: Literal["float16", "float32"] = "float16"
    quant: MadeQuant | None = None  # None: weights stay in dtype, or as the checkpoint has them
    int4_block: int | None = None  # of int4, which it implies
    original: Path | None = None  # of a quantized checkpoint: what it was made from
    own_adapters: bool = False  # adapters are trained on the quantized checkpoint itself
    max_context: int | None = None  # None: the checkpoint's limit, at most DEFAULT_CONTEXT
    max_bank_rank: int = 64
    dialect: GraphDialect | Literal["both"] = "native"
    golden: bool = True
    golden_file: Path | None = None  # None: built-in sentences
    # What adapters may change beyond the layers' dense projections, and beyond A and B.
    adapt: tuple[Adapt, ...] = ()
    dora: bool = False
    adapter_bias: bool = False


def refuse_quantizing(options: ExportOptions) -> None:
    """Of a checkpoint that is quantized already. Raises RequestInvalid."""
    if options.quant is not None or options.int4_block is not None:
        raise RequestInvalid(
            "the checkpoint is quantized already and is exported as it is: leave out --quant and "
            "--int4-block, or export the original checkpoint"
        )


def graph_spec(
    spec: DecoderSpec, options: ExportOptions, found: QuantSpec | None = None
) -> GraphSpec:
    """`found`: how a quantized checkpoint's weights are stored. Of `both`: the native graph's.

    Raises RequestInvalid, Unsupported for what this decoder or version cannot do.
    """
    quant = _quant(spec, options) if found is None else found
    if options.dialect != "native":
        _check_legacy(spec, quant)
    dialect: GraphDialect = "native" if options.dialect == "both" else options.dialect
    context = _context(spec, options.max_context)
    return GraphSpec(
        dialect=dialect,
        dtype=options.dtype,
        context=context,
        max_bank_rank=options.max_bank_rank,
        opset=opset_of(dialect, quant),
        quant=quant,
        adapt=_adapt(spec, options),
        dora=options.dora,
        adapter_bias=options.adapter_bias,
        sequence_length=None if spec.switches(context) is None else True,
    )


def legacy_spec(graph: GraphSpec) -> GraphSpec:
    """Of the second graph: the same in the legacy dialect, on the same weights."""
    return replace(graph, dialect="legacy", opset=opset_of("legacy", graph.quant))


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


def _quant(spec: DecoderSpec, options: ExportOptions) -> QuantSpec:
    kind, block = options.quant, options.int4_block
    if kind is None and block is None:
        return QuantSpec()
    if kind in (None, "int4"):
        return QuantSpec("int4", _int4_block(spec, block or _DEFAULT_INT4_BLOCK))
    if spec.experts is not None:
        raise Unsupported(f"--quant {kind} has no form for experts yet; use --quant int4")
    if block is not None:
        raise RequestInvalid(f"--int4-block goes with --quant int4, not with {kind}")
    size = _BLOCKS[kind]
    wrong = None if size is None else _undivided(spec, size)
    if wrong is not None:
        raise Unsupported(
            f"--quant {kind} has blocks of {size}, which do not divide the "
            f"{spec.in_features(wrong)} inputs of the {wrong} projection; use --quant int8"
        )
    return QuantSpec(kind, size, plain=("head",) if kind in _PLAIN_HEAD else ())


def _int4_block(spec: DecoderSpec, block: int) -> int:
    if block not in INT4_BLOCKS:
        raise Unsupported(f"--int4-block {block}: use one of {INT4_BLOCKS}")
    projection = _undivided(spec, block)
    if projection is not None:
        raise Unsupported(
            f"--int4-block {block} does not divide the {spec.in_features(projection)} inputs of "
            f"the {projection} projection; {_other_block(spec)}"
        )
    return block


def _undivided(spec: DecoderSpec, block: int) -> Projection | None:
    """A projection whose inputs are no multiple of `block`."""
    return next((p for p in used_projections(spec) if spec.in_features(p) % block), None)


def _check_legacy(spec: DecoderSpec, quant: QuantSpec) -> None:
    """Raises Unsupported."""
    if quant.kind != "int4" and quant.block is not None:
        raise Unsupported(
            f"{quant.describe()}: TensorRT 10.3 takes blocks of int4 only; use --dialect native"
        )
    if quant.kind == "int4":
        _refuse_odd_rows(spec)


def _refuse_odd_rows(spec: DecoderSpec) -> None:
    """TensorRT 10.3 packs INT4 along the last dimension and takes no odd one."""
    widths = {g: sum(spec.out_features(p) for p in PARTS[g]) for g in used_groups(spec)}
    widths |= {"head": spec.vocab}
    for name, width in widths.items():
        if width % 2:
            raise Unsupported(
                f"{name} has {width} outputs and TensorRT 10.3 takes int4 weights only with an "
                f"even number; {_not_int4(spec)}, or export it with --dialect native"
            )


def _other_block(spec: DecoderSpec) -> str:
    for block in INT4_BLOCKS:
        if _undivided(spec, block) is None:
            return f"use --int4-block {block}"
    return _not_int4(spec)


def _not_int4(spec: DecoderSpec) -> str:
    return "use --quant int8" if spec.experts is None else "export it without --quant"
