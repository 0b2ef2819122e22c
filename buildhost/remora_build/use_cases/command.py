"""`remora-build use-cases`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import typer

HELP = "Compositions of adapters under names, as in Qualcomm's QAIRT: convert, count, write back."
CONVERT = """Convert a use-case document and all its adapters for one base bundle.

Reads QAIRT's lora_config.yaml (adapter, use-case with adapter_names and adapter_alphas) or a
use_cases.json. Each adapter is converted as `remora-build adapter` does; what only QAIRT reads
(quant_overrides, model_name) is carried along. All is converted and fits, or nothing is written.
"""
SHOW = """Explain a use-case document: adapters, ranks, sizes and bank columns of each use case, and
whether it fits a bundle.
"""
TO_QAIRT = """Write a use-case document as QAIRT reads it: lora_config.yaml, and an adapter file
beside it for each adapter that did not come with one.
"""


class DtypeOption(str, Enum):
    float16 = "float16"
    float32 = "float32"


def register(app: typer.Typer) -> None:
    group = typer.Typer(help=HELP, no_args_is_help=True)
    group.command("convert", help=CONVERT)(convert)
    group.command("show", help=SHOW)(show)
    group.command("to-qairt", help=TO_QAIRT)(to_qairt)
    app.add_typer(group, name="use-cases")


def convert(
    file: Path = typer.Argument(help="lora_config.yaml or use_cases.json.", exists=True),
    out: Path = typer.Argument(help="Directory to write; it must not exist (see --force)."),
    base: Path = typer.Option(
        help="Bundle of the base model the adapters were trained on.", exists=True, file_okay=False
    ),
    adapters: Path | None = typer.Option(
        None,
        "--adapters",
        help="Folder with a PEFT adapter directory for each adapter, by its name.",
        exists=True,
        file_okay=False,
    ),
    adapter: list[str] = typer.Option(
        [], "--adapter", metavar="NAME=DIR", help="Where one adapter is; repeat for more."
    ),
    dtype: DtypeOption | None = typer.Option(
        None, help="Type of the stored factors (default: the bundle's)."
    ),
    json: bool = typer.Option(False, "--json", help="Print a JSON object instead of tables."),
    force: bool = typer.Option(False, "--force", help="Replace OUT when it is one of these."),
) -> None:
    from rich.console import Console

    from remora_build.export.progress import progress_for
    from remora_build.inspect.render import show as show_report
    from remora_build.use_cases.convert import convert_use_cases
    from remora_build.use_cases.report import describe_use_cases
    from remora_build.use_cases.source import Places

    places = Places(_named(adapter), adapters)
    with progress_for(Console(stderr=True), silent=json) as progress:
        converted = convert_use_cases(
            file,
            out,
            base=base,
            places=places,
            dtype=None if dtype is None else dtype.value,
            replace_out=force,
            progress=progress,
        )
    show_report(describe_use_cases(out, base, converted.notes), as_json=json)


def show(
    path: Path = typer.Argument(
        help="lora_config.yaml, use_cases.json or the directory of one.", exists=True
    ),
    base: Path | None = typer.Option(
        None, help="Bundle to fit into (default: no judgement).", exists=True, file_okay=False
    ),
    json: bool = typer.Option(False, "--json", help="Print a JSON object instead of tables."),
) -> None:
    from remora_build.inspect.render import show as show_report
    from remora_build.use_cases.report import describe_use_cases

    show_report(describe_use_cases(path, base), as_json=json)


def to_qairt(
    path: Path = typer.Argument(
        help="use_cases.json, the directory of one, or a lora_config.yaml.", exists=True
    ),
    file: Path = typer.Argument(help="YAML file to write; it must not exist (see --force)."),
    force: bool = typer.Option(False, "--force", help="Replace files that exist."),
) -> None:
    from remora_build.use_cases.qairt import write_qairt

    still_wanted = write_qairt(path, file, replace_file=force)
    typer.echo(f"wrote {file}")
    for what in still_wanted:
        typer.echo(f"QAIRT still needs: {what}", err=True)


def _named(texts: list[str]) -> dict[str, Path]:
    from remora_contract.errors import UsageWrong

    named: dict[str, Path] = {}
    for text in texts:
        name, separator, directory = text.partition("=")
        if not separator or not directory:
            raise UsageWrong(f"--adapter {text[:80]!r}: give NAME=DIR")
        if name in named:
            raise UsageWrong(f"--adapter {name[:80]}: the name is given twice")
        named[name] = Path(directory)
    return named
