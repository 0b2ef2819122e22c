"""The command `build`: an engine of a bundle, here or ahead of time. Prints; the build does not."""

from __future__ import annotations

import json
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from remora_agent.engine.backends import BACKENDS, BUILD_HELP
from remora_agent.serving import flags

if TYPE_CHECKING:
    from remora_agent.engine.build import BuildResult
    from remora_agent.engine.opening import EngineOptions


def register(app: typer.Typer) -> None:
    app.command()(build)


def build(
    bundle: flags.Bundle,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help=BUILD_HELP, autocompletion=lambda: list(BACKENDS))
    ] = "onnxruntime",
    sm: Annotated[
        list[int] | None,
        typer.Option(
            metavar="SM",
            help="Build ahead of time for GPUs of this compute capability: 86 is 8.6. Repeatable.",
        ),
    ] = None,
    rows: flags.Rows = 8,
    context: flags.Context = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also copy the engine here, to publish it."),
    ] = None,
    cache_dir: flags.CacheDir = None,
    timeout: Annotated[float, typer.Option(help="Seconds the build may take.")] = 3600.0,
    memory_mib: Annotated[
        int | None, typer.Option(help="Memory the build may take, MiB (default: no limit).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Build the engine of a bundle into the engine cache, and say what it takes."""
    from remora_agent.engine.backends import check_stepped
    from remora_agent.engine.child import ChildLimits
    from remora_agent.engine.opening import EngineOptions
    from remora_agent.engine.report import report
    from remora_agent.engine.taking import check_absent, take_along
    from remora_contract.bundle import load_bundle

    limits = ChildLimits(timeout, None if memory_mib is None else memory_mib << 20)
    options = EngineOptions(
        rows=rows, context=context, backend=check_stepped(backend), build_limits=limits
    )
    if out is not None:
        check_absent(out)  # now, not when the engine is built
    result = _built(bundle, options, tuple(sm or ()), cache_dir)
    if out is not None:
        take_along(result.entry, out)
    made = report(result, load_bundle(bundle), options, out)
    if as_json:
        typer.echo(json.dumps(made.plain(), indent=2))
    else:
        made.show()


def _built(
    bundle_dir: Path, options: EngineOptions, processors: tuple[int, ...], cache_dir: Path | None
) -> BuildResult:
    from remora_agent.engine.build import BuildControl
    from remora_agent.engine.cache import EngineCache
    from remora_agent.engine.opening import build_first, limits_of, recipes_of
    from remora_agent.hosting.engines import EngineSettings, default_cache
    from remora_agent.serving.progress import shown
    from remora_contract.bundle import load_bundle

    loaded = load_bundle(bundle_dir)
    limits_of(loaded, options)  # a context that the bundle has not is refused before the build
    recipes = recipes_of(loaded, options, processors)
    settings = EngineSettings(cache_dir or default_cache())
    cache = EngineCache(settings.cache_dir, settings.cache_bytes)
    stop = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        with shown(sys.stderr) as progress:
            control = BuildControl(options.build_limits, progress, stop.is_set)
            return build_first(bundle_dir, loaded, recipes, cache, control)
    finally:
        signal.signal(signal.SIGTERM, before)
