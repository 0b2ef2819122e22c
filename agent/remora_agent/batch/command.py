"""The command `remora-agent generate`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from remora_agent.batch import flags as own
from remora_agent.serving import flags
from remora_contract.errors import DocumentInvalid, RemoraError

if TYPE_CHECKING:
    from remora_agent.batch.document import BatchDocument, Names
    from remora_agent.batch.runner import Outcome
    from remora_agent.engine.opening import EngineOptions

_MAX_ROWS = 8


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    bundle: own.BundleOption,
    input_file: own.Input,
    output_file: own.Output,
    use_cases: own.UseCases = None,
    rows: own.Rows = None,
    context: flags.Context = None,
    threads: flags.Threads = None,
    prefill: flags.Prefill = "auto",
    backend: flags.Backend = "onnxruntime",
    overlap: flags.Overlap = "auto",
    cache_dir: flags.CacheDir = None,
    seed: own.Seed = None,
    min_p: own.MinP = None,
    repetition_penalty: own.RepetitionPenalty = None,
    presence_penalty: own.PresencePenalty = None,
    frequency_penalty: own.FrequencyPenalty = None,
    min_tokens: own.MinTokens = None,
    logprobs: own.Logprobs = None,
) -> None:
    """Answers a file of requests and writes a file of answers. Needs no server. Options of
    sampling win over the file's."""
    from remora_agent.batch import report
    from remora_agent.batch.document import read_document
    from remora_agent.engine.backends import check_overlap, check_stepped
    from remora_agent.engine.opening import EngineOptions
    from remora_agent.engine.prefill import check_choice

    document = read_document(_read(input_file), str(input_file), _known(use_cases))
    document = document.overriding(
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        min_tokens=min_tokens,
        logprobs=logprobs,
    )
    report.check_writable(output_file)  # now, not when all the answers are there
    if rows is None:
        rows = min(document.settings.batch_size, _MAX_ROWS)
    options = EngineOptions(
        rows=rows,
        context=context,
        threads=threads,
        prefill=check_choice(prefill),
        backend=check_stepped(backend),
        overlap=check_overlap(overlap),
    )
    outcomes = _answer(bundle, document, use_cases, options, cache_dir, seed)
    report.write_atomically(output_file, report.report(str(input_file), document, outcomes))
    failed = [o for o in outcomes if o.error is not None]
    typer.echo(f"{len(outcomes) - len(failed)} of {len(outcomes)} answered, in {output_file}")
    if failed:
        first = failed[0]
        raise RemoraError(
            f"{len(failed)} of {len(outcomes)} requests failed; "
            f"the first, request {first.index}: {first.error}"
        )


def _answer(
    bundle: Path,
    document: BatchDocument,
    use_cases: Path | None,
    options: EngineOptions,
    cache_dir: Path | None,
    seed: int | None,
) -> list[Outcome]:
    from remora_agent.batch.runner import run_batch
    from remora_agent.batch.weights import adapter_directory
    from remora_agent.hosting.engines import CachedEngines, EngineSettings, default_cache
    from remora_agent.local_host import HostSettings, LocalHost
    from remora_agent.runtime.options import RuntimeOptions
    from remora_agent.serving.progress import shown
    from remora_agent.serving.router import Router
    from remora_agent.serving.served_model import ServedModel
    from remora_agent.serving.standalone import local_assignment

    adapters = {
        name: adapter_directory(name, Path(path), bundle)
        for name, path in document.settings.available_lora_weights.items()
    }
    assignment = local_assignment(bundle, adapters, document.use_cases, use_cases)
    router: Router[ServedModel] = Router()
    engines = CachedEngines(EngineSettings(cache_dir or default_cache(), options=options))
    # One caller, who may have three quarters of the queue and wants twice the rows of it.
    runtime = RuntimeOptions(max_waiting=max(256, 4 * options.rows))
    if not document.drafts:
        runtime = replace(runtime, draft_tokens=0)
    host = LocalHost(engines, router, HostSettings(runtime))
    try:
        with shown(sys.stderr) as progress:
            host.build(assignment, progress)
            host.switch(assignment)
            with router.entering_blocking() as model:
                total = len(document.requests)
                return run_batch(
                    model, document, seed, lambda done: progress("answering", done / total)
                )
    finally:
        host.drain(0.0)


def _known(use_cases: Path | None) -> Names:
    from remora_agent.batch.document import Names
    from remora_contract.use_cases import load_use_cases

    if use_cases is None:
        return Names()
    document, _ = load_use_cases(use_cases)
    return Names(frozenset(a.name for a in document.adapters), document.release_use_cases())


def _read(path: Path) -> bytes:
    from remora_agent.batch.document import MAX_INPUT_BYTES

    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise DocumentInvalid(f"{path} is larger than {MAX_INPUT_BYTES >> 20} MiB; split it")
        return path.read_bytes()
    except OSError as e:
        raise DocumentInvalid(f"{path} cannot be read: {e.strerror or e}") from e
