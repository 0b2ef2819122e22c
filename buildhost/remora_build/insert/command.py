"""`remora-build insert-lora`. Owns words and flags; the work is in `inserter`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from remora_build.insert.attach import AttachPlan
    from remora_build.insert.description import InsertedBank
    from remora_contract.targets import Projection

HELP = """Add the adapter bank to an ONNX decoder that Remora did not export.

Finds the projections of every layer (MatMul, Gemm, MatMulNBits, dequantized and Q/DQ forms, plugins
of TensorRT Edge-LLM) and gives each a low-rank branch whose factors are inputs of the graph. All
layers' q, k, v, o, gate, up and down are found, or nothing is written and the error names what is
missing.
"""

Model = Annotated[Path, typer.Argument(help="ONNX model; external data is looked for beside it.")]
Out = Annotated[
    Path | None,
    typer.Argument(
        help="Directory to create: the model, lora.json and attach.json. May be left out with "
        "--write-attach."
    ),
]
AttachOption = Annotated[
    Path | None,
    typer.Option(
        "--attach",
        help="Attach points to use (JSON): which node is which projection.",
        show_default="derived from names and structure",
    ),
]
WriteOption = Annotated[
    Path | None,
    typer.Option(
        "--write-attach",
        help="Write the derived attach points to this file, complete or not, for correction.",
        show_default="only into OUT",
    ),
]
TargetsOption = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="Projections to adapt, of q,k,v,o,gate,up,down; a fused projection comes whole.",
        show_default="all seven",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("insert-lora", help=HELP)(insert_lora)


def insert_lora(
    model: Model,
    out: Out = None,
    attach: AttachOption = None,
    write_attach: WriteOption = None,
    targets: TargetsOption = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace OUT, when it is such a directory, and the --write-attach file."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    from rich.console import Console

    from remora_build.export.progress import progress_for
    from remora_build.insert.inserter import analyse, insert_bank, write_plan

    if out is None and write_attach is None:
        raise typer.BadParameter("give OUT, or --write-attach FILE to see the attach points only")
    wanted = _projections(targets)
    began = time.monotonic()
    analysis = analyse(model, attach=attach, wanted=wanted)
    if write_attach is not None:
        write_plan(analysis.plan, write_attach, replace=force)
    if out is None:
        _report_plan(write_attach, analysis.plan, as_json)
        analysis.check()
        return
    with progress_for(Console(stderr=True), silent=as_json) as progress:
        bank = insert_bank(analysis, out, replace=force, progress=progress)
    _report(out, bank, time.monotonic() - began, as_json)


def _report_plan(path: Path | None, plan: AttachPlan, as_json: bool) -> None:
    counts = {
        "points": len(plan.points),
        "not_adapted": len(plan.not_adapted),
        "undecided": len(plan.undecided),
    }
    if as_json:
        sys.stdout.write(json.dumps({"attach": str(path), **counts}) + "\n")
        return
    text = ", ".join(f"{count} {word.replace('_', ' ')}" for word, count in counts.items())
    sys.stdout.write(f"{path}: {text}\n")


def _projections(text: str | None) -> tuple[Projection, ...]:
    from remora_contract.targets import PROJECTIONS

    if text is None:
        return PROJECTIONS
    asked = [word.strip() for word in text.split(",")]
    unknown = [word for word in asked if word not in PROJECTIONS]
    if unknown or not asked:
        known = ", ".join(PROJECTIONS)
        raise typer.BadParameter(f"--targets: {unknown[0]!r} is none of {known}")
    return tuple(p for p in PROJECTIONS if p in asked)


def _report(out: Path, bank: InsertedBank, seconds: float, as_json: bool) -> None:
    layers = len({b.layer for b in bank.branches})
    if as_json:
        summary = {
            "out": str(out),
            "layers": layers,
            "branches": len(bank.branches),
            "gates": {g.name: {"dtype": g.dtype, "rows": g.rows} for g in bank.gates},
            "bytes": bank.bytes,
            "seconds": round(seconds, 3),
        }
        sys.stdout.write(json.dumps(summary) + "\n")
        return
    slots = ", ".join(g.slot for g in bank.gates)
    first = bank.gates[0]
    sys.stdout.write(
        f"{out}: {len(bank.branches)} branches in {layers} layers ({slots}), {first.dtype}, rows "
        f"are {first.rows}, {bank.bytes / 1e6:.1f} MB in {seconds:.1f} s\n"
        f"the inputs to feed are listed in {out / 'lora.json'}\n"
    )
