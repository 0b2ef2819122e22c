"""`remora-build adapter`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

HELP = """Convert a PEFT LoRA adapter into a Remora adapter for one base bundle.

Honours r, lora_alpha, use_rslora, rank_pattern, alpha_pattern, target_modules, exclude_modules and
layers_to_transform; every other feature is refused by its name. Every tensor is bound or nothing
is written.
"""


class DtypeOption(str, Enum):
    float16 = "float16"
    float32 = "float32"


def register(app: typer.Typer) -> None:
    app.command("adapter", help=HELP)(adapter)


def adapter(
    peft_dir: Path = typer.Argument(
        help="Directory with adapter_config.json and adapter_model.safetensors.",
        exists=True,
        file_okay=False,
    ),
    out: Path = typer.Argument(help="Directory to write; it must not exist (see --force)."),
    base: Path = typer.Option(
        help="Bundle of the base model the adapter was trained on.", exists=True, file_okay=False
    ),
    dtype: DtypeOption | None = typer.Option(
        None, help="Type of the stored factors (default: the bundle's)."
    ),
    json: bool = typer.Option(False, "--json", help="Print a JSON object instead of a table."),
    force: bool = typer.Option(False, "--force", help="Replace OUT when it is an adapter."),
) -> None:
    from remora_build.adapters.convert import convert_adapter
    from remora_build.inspect.adapter import describe_adapter
    from remora_build.inspect.render import show

    convert_adapter(
        peft_dir, out, base=base, dtype=None if dtype is None else dtype.value, replace=force
    )
    show(describe_adapter(out), as_json=json)
