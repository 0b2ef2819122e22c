"""`remora-build edgellm`. Owns words and flags; the work is in `wrap`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

HELP = """Wrap an engine folder of TensorRT Edge-LLM as a bundle.

ENGINE_DIR is what Edge-LLM's own builder wrote (llm.engine, config.json, its tokenizer); its files
are copied as they are. Devices serve the bundle with `backend = "edgellm"`: docs/edgellm.md says
what they can and cannot do with it.
"""


def register(app: typer.Typer) -> None:
    app.command("edgellm", help=HELP)(edgellm)


def edgellm(
    engine_dir: Annotated[
        Path, typer.Argument(help="Engine folder.", exists=True, file_okay=False)
    ],
    out: Annotated[Path, typer.Argument(help="Bundle directory to create.")],
    checkpoint: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Checkpoint that the engine was made of, before it was quantized: its tokenizer, "
            "chat template and what its adapters are bound to.",
            exists=True,
            file_okay=False,
        ),
    ],
    version: Annotated[
        str | None,
        typer.Option(
            "--edgellm-version",
            metavar="VERSION",
            help="tensorrt-edgellm that built the engine: devices with another refuse it.",
            show_default="not checked",
        ),
    ] = None,
    sm: Annotated[
        int | None,
        typer.Option(
            metavar="SM",
            help="Compute capability that the engine is for (87 is 8.7), for people to read.",
            show_default="not said",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the model.", show_default="the checkpoint directory's"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT, when it is a bundle directory.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    from rich.console import Console

    from remora_build.edgellm.wrap import wrap_engine
    from remora_build.export.progress import progress_for

    with progress_for(Console(stderr=True), silent=as_json) as progress:
        bundle = wrap_engine(
            engine_dir,
            out,
            checkpoint=checkpoint,
            name=name,
            version=version,
            sm=sm,
            replace=force,
            progress=progress,
        )
    if as_json:
        summary = {"out": str(out), "digest": bundle.digest, "bytes": bundle.bytes}
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    graph = bundle.graph
    sys.stdout.write(
        f"{out}: {bundle.digest}\n"
        f"context {graph.context}, adapters of rank {graph.max_bank_rank} at most, "
        f"{bundle.bytes / 1e6:.1f} MB\n"
    )
