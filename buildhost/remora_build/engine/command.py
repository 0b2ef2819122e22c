"""`remora-build engine`: engines for devices, ahead of time, on the build host.

The builder is the device's own (docs/adr/0011), run as a program: nothing of it is imported here.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from remora_contract.errors import Unsupported

_AGENT = "remora_agent"
HELP = """Build the engine of BUNDLE ahead of time for other GPUs, into a new directory OUT that
`remora-build publish` takes. Needs remora\\[agent] and remora\\[tensorrt] on this machine."""


def register(app: typer.Typer) -> None:
    app.command("engine", help=HELP)(engine)


def engine(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the engine.")],
    sm: Annotated[
        list[int],
        typer.Option(metavar="SM", help="Compute capability: 86 is 8.6. Repeatable."),
    ],
    backend: Annotated[str, typer.Option(metavar="NAME")] = "tensorrt_rtx",
    rows: Annotated[int, typer.Option(help="Requests that a device decodes together.")] = 8,
    context: Annotated[
        int | None, typer.Option(help="Tokens a request may hold (default: the bundle's capacity).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    if find_spec(_AGENT) is None:
        raise Unsupported("engines are built by the device's builder: pip install 'remora[agent]'")
    options = [f"--backend={backend}", f"--rows={rows}", f"--out={out}"]
    options += [f"--sm={processor}" for processor in sm]
    options += [] if context is None else [f"--context={context}"]
    options += ["--json"] if as_json else []
    sys.stdout.flush()
    # In our place: signals, terminal and exit status are the builder's.
    os.execv(sys.executable, [sys.executable, "-m", _AGENT, "build", *options, "--", str(bundle)])
