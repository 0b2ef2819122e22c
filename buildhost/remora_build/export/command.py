"""`remora-build export`. Owns words and flags; the work is in `exporter`."""

from __future__ import annotations

import enum
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remora_contract.bundle import MAX_BANK_RANK

if TYPE_CHECKING:
    from remora_contract.bundle import Bundle


class Dtype(str, enum.Enum):
    float16 = "float16"
    float32 = "float32"


class Int4Block(str, enum.Enum):
    b32 = "32"
    b128 = "128"


class Adapt(str, enum.Enum):
    embed = "embed"
    head = "head"
    experts = "experts"


class Quant(str, enum.Enum):
    int4 = "int4"
    int8 = "int8"
    mxfp8 = "mxfp8"
    nvfp4 = "nvfp4"


class Dialect(str, enum.Enum):
    native = "native"
    legacy = "legacy"
    both = "both"


Checkpoint = Annotated[
    Path,
    typer.Argument(
        help="Hugging Face checkpoint directory with safetensors, of a family in docs/support.md."
    ),
]
Out = Annotated[Path, typer.Argument(help="Bundle directory to create.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="Of activations, cache and adapters. float32 runs on ONNX Runtime only."),
]
Int4Option = Annotated[
    Int4Block | None,
    typer.Option(
        "--int4-block",
        help="With --quant int4, which it implies: weights that share a scale.",
        show_default="32",
    ),
]
QuantOption = Annotated[
    Quant | None,
    typer.Option(
        "--quant",
        help="Quantize projections and head: int4, int8, mxfp8 (Ada and later), nvfp4 (Blackwell).",
        show_default="as the checkpoint has them",
    ),
]
OriginalOption = Annotated[
    Path | None,
    typer.Option(
        "--original",
        help="Of a quantized checkpoint: the one it was made from. Adapters trained on that fit.",
    ),
]
OwnAdaptersOption = Annotated[
    bool,
    typer.Option(
        "--own-adapters",
        help="Of a quantized checkpoint: adapters were trained on it, not on its original.",
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--max-context",
        min=1,
        help="Tokens a sequence may hold; sets the size of the cache.",
        show_default="the checkpoint's limit, at most 4096",
    ),
]
RankOption = Annotated[
    int,
    typer.Option(
        "--max-bank-rank",
        min=0,
        max=MAX_BANK_RANK,
        help="Sum of the ranks of all adapters resident at once; 0 leaves adapters out.",
    ),
]
AdaptOption = Annotated[
    list[Adapt] | None,
    typer.Option(
        "--adapt",
        help="Let adapters change this too: the embedding, the output head, or the experts of a "
        "mixture. May be given several times.",
        show_default="the projections of the layers only",
    ),
]
DoraOption = Annotated[
    bool, typer.Option("--dora", help="Take DoRA adapters: a factor for each output.")
]
AdapterBiasOption = Annotated[
    bool,
    typer.Option("--adapter-bias", help="Take adapters with trained biases or a bias on B."),
]
GoldenOption = Annotated[
    Path | None,
    typer.Option(
        "--golden",
        help='Prompts to prove engines with, a JSON object a line: {"text": …} or {"tokens": […]}.',
        show_default="built-in sentences",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("export")(export)


def export(
    checkpoint: Checkpoint,
    out: Out,
    dtype: DtypeOption = Dtype.float16,
    quant: QuantOption = None,
    int4_block: Int4Option = None,
    original: OriginalOption = None,
    own_adapters: OwnAdaptersOption = False,
    max_context: ContextOption = None,
    max_bank_rank: RankOption = 64,
    adapt: AdaptOption = None,
    dora: DoraOption = False,
    adapter_bias: AdapterBiasOption = False,
    dialect: Annotated[
        Dialect,
        typer.Option(
            help="Operators: native for TensorRT 10.15 or later, legacy for 10.3 to 10.14, both: "
            "two graphs on one weight file, and the device chooses."
        ),
    ] = Dialect.native,
    name: Annotated[
        str | None,
        typer.Option(
            help="What people call the model.",
            show_default="the directory's, or the repository's in a Hugging Face cache",
        ),
    ] = None,
    golden: GoldenOption = None,
    no_golden: Annotated[
        bool, typer.Option("--no-golden", help="Record no golden prompts; bundle.json says so.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a bundle at OUT, once the new one is complete."),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Turn a checkpoint into a portable ONNX bundle with adapter inputs."""
    from rich.console import Console

    from remora_build.export.exporter import export_checkpoint
    from remora_build.export.options import ExportOptions
    from remora_build.export.progress import progress_for

    if golden is not None and no_golden:
        raise typer.BadParameter("--golden and --no-golden exclude each other")
    if original is not None and own_adapters:
        raise typer.BadParameter("--original and --own-adapters exclude each other")
    if int4_block is not None and quant not in (None, Quant.int4):
        raise typer.BadParameter(f"--int4-block goes with --quant int4, not {quant.value}")
    options = ExportOptions(
        dtype=dtype.value,
        quant=quant.value if quant else None,
        int4_block=int(int4_block.value) if int4_block else None,
        original=original,
        own_adapters=own_adapters,
        max_context=max_context,
        max_bank_rank=max_bank_rank,
        dialect=dialect.value,
        golden=not no_golden,
        golden_file=golden,
        adapt=tuple(part.value for part in adapt or ()),
        dora=dora,
        adapter_bias=adapter_bias,
    )
    began = time.monotonic()
    with progress_for(Console(stderr=True), silent=as_json) as progress:
        bundle = export_checkpoint(
            checkpoint, out, options, name=name, replace=force, progress=progress
        )
    _report(out, bundle, time.monotonic() - began, as_json)


def _report(out: Path, bundle: Bundle, seconds: float, as_json: bool) -> None:
    if as_json:
        summary = {
            "bundle": str(out),
            "digest": bundle.digest,
            "base_digest": bundle.base_digest,
            "bytes": bundle.bytes,
            "context": bundle.graph.context,
            "max_bank_rank": bundle.graph.max_bank_rank,
            "golden": "golden" not in bundle.notes,
            "seconds": round(seconds, 3),
        }
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    sys.stdout.write(
        f"{out}: {bundle.source.name}, {_precision(bundle)}, context {bundle.graph.context}, "
        f"{bundle.bytes / 1e6:.1f} MB in {seconds:.1f} s\n"
        f"bundle {bundle.digest}\nbase   {bundle.base_digest}\n"
    )


def _precision(bundle: Bundle) -> str:
    quant = bundle.graph.quant
    if quant.kind == "none":
        return bundle.graph.dtype
    return f"{quant.describe()}, {bundle.graph.dtype}"
