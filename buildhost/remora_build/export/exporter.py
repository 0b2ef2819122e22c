"""The export from start to end: config, tensors, graph, weights, tokenizer and golden prompts
composed into a bundle that appears whole or not at all.

Owns the order of work; each step's rules are elsewhere. bundle.json is written last.
"""

from __future__ import annotations

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
from tokenizers import Tokenizer

from remora_build.checkpoint.directory import CONFIG, read_json
from remora_build.checkpoint.inventory import base_digest, check_tied
from remora_build.checkpoint.stream import TensorStream
from remora_build.export.options import ExportOptions, graph_spec, legacy_spec
from remora_build.export.progress import Progress, SilentProgress
from remora_build.export.source import Source, read_source
from remora_build.golden.prompts import Prompt, builtin_prompts, read_prompts
from remora_build.golden.record import record
from remora_build.golden.runtime import require_runtime
from remora_build.graph.data_file import DataFile
from remora_build.graph.decoder import DATA_FILE, build_graph
from remora_build.graph.layout import Slot, lay_out
from remora_build.graph.lint import check_graph
from remora_build.graph.weights import WeightWriter
from remora_build.staging import staged_directory
from remora_build.tokenizer import (
    SpecialTokens,
    copy_tokenizer,
    load_tokenizer,
    special_tokens,
    tokens_beyond,
)
from remora_build.version import exporter_name
from remora_contract.bundle import (
    BUNDLE_JSON,
    FORMAT_VERSION,
    GOLDEN_JSON,
    GRAPH_FILE,
    LEGACY_GRAPH_FILE,
    TWO_GRAPHS_VERSION,
    Bundle,
    BundleFile,
    GraphSpec,
    SourceInfo,
)
from remora_contract.decoder import DecoderSpec
from remora_contract.digests import canonical_json, digest_file
from remora_contract.errors import InternalFault, RequestInvalid
from remora_contract.quant import least_compute_capability

log = logging.getLogger(__name__)

_THREADS = 2  # beside the reading and the writing one
_DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@dataclass(frozen=True)
class _Plan:
    """Everything decided before the first byte is written."""

    checkpoint: Path
    name: str
    options: ExportOptions
    source: Source
    graph: GraphSpec
    second: GraphSpec | None  # on the same weights: no slot depends on the dialect
    slots: dict[str, Slot]
    special: SpecialTokens
    prompts: tuple[Prompt, ...]
    beyond: tuple[str, ...]  # tokens that only the tokenizer has


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    options: ExportOptions,
    *,
    name: str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Writes the bundle directory `out` and returns its document.

    Raises CheckpointInvalid, DocumentInvalid, RequestInvalid or Unsupported for the input, Conflict
    when `out` exists and `replace` is not given, Exhausted on a full disk. On any error, and when
    killed, `out` is as it was before.
    """
    shown = progress or SilentProgress()
    name = _checked_name(name or default_name(checkpoint.resolve()))
    plan = _plan(checkpoint, name, options, shown)
    with staged_directory(out, marker=BUNDLE_JSON, replace=replace) as staging:
        _write_graphs(plan, staging)
        data, base = _write_weights(plan, staging, shown)
        graphs = [GRAPH_FILE, *([LEGACY_GRAPH_FILE] if plan.second else [])]
        for path in graphs:
            onnx.checker.check_model(str(staging / path))
        carried = copy_tokenizer(checkpoint, staging)
        if plan.prompts:
            _write_golden(plan, staging, shown)
        small = [*graphs, *carried, *([GOLDEN_JSON] if plan.prompts else [])]
        files = [data, *(_described(staging, path) for path in small)]
        bundle = _document(plan, base, tuple(sorted(files, key=lambda f: f.path)))
        (staging / BUNDLE_JSON).write_bytes(canonical_json(bundle))
    log.info("bundle.exported", extra={"digest": bundle.digest, "bytes": bundle.bytes})
    return bundle


def default_name(checkpoint: Path) -> str:
    """The directory's name; in a Hugging Face cache, whose directories are named after revisions
    (`models--ORG--NAME/snapshots/REVISION`), `ORG/NAME`."""
    repository = checkpoint.parent.parent.name
    if checkpoint.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return checkpoint.name


def _checked_name(name: str) -> str:
    """Raises RequestInvalid when no document can hold it."""
    if any("\ud800" <= c <= "\udfff" for c in name):
        raise RequestInvalid(f"the name {name!r} is not UTF-8; give another with --name")
    return name


def _plan(checkpoint: Path, name: str, options: ExportOptions, progress: Progress) -> _Plan:
    source = read_source(checkpoint, options, progress)
    spec, quantized = source.spec, source.quantized
    graph = graph_spec(spec, options, quantized.quant if quantized else None)
    tokenizer = load_tokenizer(checkpoint, spec)
    return _Plan(
        checkpoint=checkpoint,
        name=name,
        options=options,
        source=source,
        graph=graph,
        second=legacy_spec(graph) if options.dialect == "both" else None,
        slots=lay_out(spec, graph, quantized.forms if quantized else None),
        special=special_tokens(checkpoint, spec.vocab),
        prompts=_prompts(tokenizer, options, spec, graph),
        beyond=tokens_beyond(tokenizer, spec.vocab),
    )


def _prompts(
    tokenizer: Tokenizer, options: ExportOptions, spec: DecoderSpec, graph: GraphSpec
) -> tuple[Prompt, ...]:
    """Tokenized before the long work, so that a damaged tokenizer or file fails at once."""
    if not options.golden:
        return ()
    require_runtime(onnxruntime.__version__, graph.dialect)
    if options.golden_file is None:
        return builtin_prompts(tokenizer, graph.context)
    return read_prompts(options.golden_file, tokenizer, graph.context, spec.vocab)


def _write_graphs(plan: _Plan, staging: Path) -> None:
    forms = plan.source.quantized.forms if plan.source.quantized else None
    for graph, path in ((plan.graph, GRAPH_FILE), (plan.second, LEGACY_GRAPH_FILE)):
        if graph is not None:
            model = build_graph(plan.source.spec, graph, plan.slots, forms)
            check_graph(model, graph.dialect)
            ir.save(model, staging / path)


def _write_weights(plan: _Plan, staging: Path, progress: Progress) -> tuple[BundleFile, str]:
    """The data file's entry, and the base digest that fell out of reading."""
    inventory, tensors, tied_copy = (
        plan.source.inventory,
        plan.source.inventory.tensors,
        plan.source.inventory.tied_copy,
    )
    advance = progress.stage("weights", sum(e.bytes for e in tensors.values()))
    with (
        TensorStream() as stream,
        DataFile(staging / DATA_FILE) as out,
        ThreadPoolExecutor(_THREADS, thread_name_prefix="quantize") as pool,
    ):
        if tied_copy is not None:
            stream.digest(tied_copy)
        WeightWriter(
            inventory.naming,
            plan.graph,
            plan.slots,
            tensors,
            stream,
            out,
            pool,
            advance,
            plan.source.quantized,
        ).write_all()
        if tied_copy is not None:
            check_tied(inventory.naming, tied_copy, stream.digests)
        own = base_digest(plan.source.spec, tensors, stream.digests)
        return out.finish(DATA_FILE), plan.source.base_digest or own


def _write_golden(plan: _Plan, staging: Path, progress: Progress) -> None:
    advance = progress.stage("golden prompts", plan.source.spec.layers)
    golden = record(staging, plan.source.spec, plan.graph, plan.slots, plan.prompts, advance)
    (staging / GOLDEN_JSON).write_bytes(canonical_json(golden))


def _described(staging: Path, path: str) -> BundleFile:
    file = staging / path
    return BundleFile(path, file.stat().st_size, digest_file(file))


def _document(plan: _Plan, base: str, files: tuple[BundleFile, ...]) -> Bundle:
    if len({f.path for f in files}) != len(files):
        raise InternalFault("a file is listed twice in the bundle")
    return Bundle(
        format_version=TWO_GRAPHS_VERSION if plan.second else FORMAT_VERSION,
        base_digest=base,
        decoder=plan.source.spec,
        graph=plan.graph,
        files=files,
        eos_token_ids=plan.special.eos,
        bos_token_id=plan.special.bos,
        pad_token_id=plan.special.pad,
        source=SourceInfo(
            name=plan.name,
            model_type=str(read_json(plan.checkpoint / CONFIG)["model_type"]),
            dtype=_DTYPE_NAMES[
                plan.source.inventory.tensors[plan.source.inventory.naming.embedding].dtype
            ],
        ),
        exporter=exporter_name(),
        notes=_notes(plan),
    )


def _notes(plan: _Plan) -> dict[str, Any]:
    notes: dict[str, Any] = {}
    if plan.source.notes:
        notes["quantized"] = plan.source.notes
    if plan.source.inventory.left_out:
        notes["left_out"] = _by_beginning(plan.source.inventory.left_out)
    if plan.beyond:
        notes["tokens_beyond"] = (
            f"only the tokenizer has {', '.join(plan.beyond)}: prompts with them are refused"
        )
    if not plan.prompts:
        notes["golden"] = "not recorded (--no-golden): engines are not proven before they serve"
    if plan.graph.dtype == "float32" and plan.graph.dialect == "native" and not plan.second:
        notes["engines"] = "ONNX Runtime only: TensorRT has no float32 Attention kernel"
    least = least_compute_capability(plan.graph.quant)
    if least is not None:
        notes["weights"] = (
            f"{plan.graph.quant.kind}: TensorRT needs compute capability "
            f"{least // 10}.{least % 10} or later; on ONNX Runtime they take the memory of float32"
        )
    return notes


def _by_beginning(tensors: tuple[str, ...]) -> dict[str, str]:
    """What a multimodal checkpoint holds beside its text part: `vision_tower` -> `439 tensors`."""
    counts: Counter[str] = Counter()
    for name in tensors:
        head, _, rest = name.partition(".")
        counts[f"model.{rest.partition('.')[0]}" if head == "model" else head] += 1
    return {name: f"{count} tensors" for name, count in sorted(counts.items())}
