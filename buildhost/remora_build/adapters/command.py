"""`remora-build adapter`. Owns words and flags; the work is in `formats.translate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from remora_build.adapters.formats.manifest import ForeignAdapter
    from remora_build.export.progress import Progress
    from remora_build.inspect.render import Report
    from remora_contract.adapter import Adapter

HELP = """Convert an adapter for one base bundle: from PEFT, Remora, TensorRT Edge-LLM or
TensorRT-LLM to Remora (the default), Edge-LLM or TensorRT-LLM.

Of PEFT it carries LoRA in all its forms, DoRA, biases, embeddings, heads, tokens and experts
included, where the bundle was exported for them; what it does not carry, and whatever the other
format has no place for, is refused by its name. Every tensor is carried or nothing is written.
"""


class FormatOption(str, Enum):
    remora = "remora"
    edgellm = "edgellm"
    trtllm = "trtllm"


class SourceOption(str, Enum):
    peft = "peft"
    remora = "remora"
    edgellm = "edgellm"
    trtllm = "trtllm"


class DtypeOption(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class GateUpOption(str, Enum):
    up_gate = "up-gate"
    gate_up = "gate-up"


def register(app: typer.Typer) -> None:
    app.command("adapter", help=HELP)(adapter)


def adapter(
    source: Path = typer.Argument(
        help="Directory of the adapter; its files show the format (see --from).",
        exists=True,
        file_okay=False,
    ),
    out: Path = typer.Argument(help="Directory to write; it must not exist (see --force)."),
    base: Path = typer.Option(
        help="Bundle of the base model the adapter was trained on.", exists=True, file_okay=False
    ),
    target: FormatOption = typer.Option(
        FormatOption.remora, "--format", help="Format to write (default: remora)."
    ),
    source_format: SourceOption | None = typer.Option(
        None, "--from", help="Format of SOURCE, where its files show more than one."
    ),
    dtype: DtypeOption | None = typer.Option(
        None,
        help="Type of the stored factors (default: the bundle's; float16 for edgellm, which has no "
        "other). bfloat16 is for trtllm.",
    ),
    tp_size: int = typer.Option(
        1,
        "--tp-size",
        min=1,
        help="Ranks of tensor parallelism to write one pair of files each for, with --format "
        "trtllm (default: 1, the pair that the runtime splits itself).",
    ),
    gate_up_order: GateUpOption | None = typer.Option(
        None,
        "--gate-up-order",
        help="Order of gate and up in a trtllm adapter's fused mlp_gate_up, which the files do "
        "not tell; needed only where they have one.",
    ),
    checkpoint: Path | None = typer.Option(
        None,
        help="Checkpoint that BASE was exported from; DoRA needs it where BASE is quantized.",
        exists=True,
        file_okay=False,
    ),
    initial: Path | None = typer.Option(
        None,
        help="A PEFT adapter as it was saved before training, where its initialisation (PiSSA, "
        "OLoRA, CorDA, LoRA-GA) changed the base weights.",
        exists=True,
        file_okay=False,
    ),
    json: bool = typer.Option(False, "--json", help="Print a JSON object instead of a table."),
    force: bool = typer.Option(
        False, "--force", help="Replace OUT when it is an adapter of the same format."
    ),
) -> None:
    from remora_build.adapters.formats.translate import Options, translate
    from remora_build.inspect.render import show_facts

    options = Options(
        source=None if source_format is None else source_format.value,
        target=target.value,
        dtype=None if dtype is None else dtype.value,
        tp_size=tp_size,
        gate_up=None if gate_up_order is None else gate_up_order.value,
        replace=force,
        checkpoint=checkpoint,
        initial=initial,
    )
    with _progress(silent=json or checkpoint is None) as progress:
        written = translate(source, out, base=base, options=options, progress=progress)
    show_facts(_report(out, written), as_json=json)


@contextmanager
def _progress(*, silent: bool) -> Iterator[Progress | None]:
    """Only a checkpoint takes long enough to show it."""
    if silent:
        yield None
        return
    from rich.console import Console

    from remora_build.export.progress import progress_for

    with progress_for(Console(stderr=True), silent=False) as progress:
        yield progress


def _report(out: Path, written: Adapter | ForeignAdapter) -> Report:
    from remora_build.inspect import adapter as own
    from remora_contract.adapter import Adapter

    if isinstance(written, Adapter):
        return own.report_of(out, written)
    from remora_build.inspect import foreign

    return foreign.report_of(out, written)
