"""`remora-build merge`. Owns words and flags; the work is in `merger`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from remora_build.merge.merger import Merged

HELP = (
    "Merge PEFT LoRA adapters into a Hugging Face checkpoint, for good.\n\n"
    "OUT becomes a complete checkpoint with the weights W + Σ weight · scaling · B A (PEFT's "
    'combination type "cat"), in the dtype and the shards of CHECKPOINT. Neither torch nor peft is '
    "needed, and no shard is held in memory. Every tensor of every adapter is used, or nothing is "
    "written."
)

Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="Hugging Face checkpoint directory, safetensors, not quantized."
    ),
]
PeftDirs = Annotated[
    list[Path],
    typer.Argument(
        metavar="PEFT_DIR",
        help="Directories with adapter_config.json and adapter_model.safetensors, one or more.",
    ),
]
Out = Annotated[
    Path, typer.Argument(metavar="OUT", help="Checkpoint directory to create; always comes last.")
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights",
        metavar="W[,W...]",
        help="How much of each adapter, in the order of the PEFT_DIRs, as in 0.7,0.3.",
        show_default="1 each",
    ),
]

Base = Annotated[
    Path | None,
    typer.Option(
        "--base",
        metavar="BUNDLE",
        exists=True,
        file_okay=False,
        help="Bundle of the model that the adapters were trained on: refuse CHECKPOINT unless the "
        "bundle was exported from these very weights.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    app.command("merge", help=HELP)(merge)


def merge(
    checkpoint: Checkpoint,
    peft_dirs: PeftDirs,
    out: Out,
    weights: Weights = None,
    base: Base = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace an earlier merge at OUT, once the new one is complete."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    # Panels are spread over threads here; a BLAS with threads of its own would fight them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from rich.console import Console

    from remora_build.export.progress import progress_for
    from remora_build.merge.adapter import Weighted
    from remora_build.merge.merger import merge_adapters

    shares = _numbers(weights, len(peft_dirs))
    adapters = [Weighted(d, w) for d, w in zip(peft_dirs, shares, strict=True)]
    began = time.monotonic()
    with progress_for(Console(stderr=True), silent=as_json) as progress:
        merged = merge_adapters(
            checkpoint, adapters, out, replace=force, base=base, progress=progress
        )
    _report(out, merged, time.monotonic() - began, as_json)


def _numbers(given: list[str] | None, count: int) -> list[float]:
    """One per adapter; `--weights` may also be repeated."""
    if not given:
        return [1.0] * count
    try:
        numbers = [float(part) for part in ",".join(given).split(",")]
    except ValueError as e:
        raise typer.BadParameter(f"{','.join(given)} are no numbers", param_hint="--weights") from e
    if len(numbers) != count:
        raise typer.BadParameter(
            f"{len(numbers)} weights for {count} PEFT_DIRs", param_hint="--weights"
        )
    return numbers


def _report(out: Path, merged: Merged, seconds: float, as_json: bool) -> None:
    if as_json:
        adapters = [{"name": a.name, "weight": a.weight} for a in merged.adapters]
        summary = {
            "checkpoint": str(out),
            "adapters": adapters,
            "tensors": merged.tensors,
            "changed": merged.changed,
            "untied": merged.untied,
            "bytes": merged.bytes,
            "seconds": round(seconds, 3),
        }
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    names = " + ".join(f"{a.weight:g} · {a.name}" for a in merged.adapters)
    sys.stdout.write(
        f"{out}: {names}, {merged.changed} of {merged.tensors} tensors changed, "
        f"{merged.bytes / 1e6:.1f} MB in {seconds:.1f} s\n"
    )
    if merged.untied:
        sys.stdout.write(
            "the head no longer equals the embedding: it has a tensor of its own now, and "
            "config.json says tie_word_embeddings: false\n"
        )
