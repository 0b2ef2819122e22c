"""One ONNX model -> one directory with its bank. Ties reading, mapping, rewriting and writing
together; decides nothing itself.

External data is copied file by file and hashed on the way; of a weight inside the model file one
copy is in memory, of one outside none.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remora_build.export.progress import Progress, SilentProgress
from remora_build.insert.attach import AttachPlan, load_plan
from remora_build.insert.branches import Branch, Gate, resolve, resolved_plan
from remora_build.insert.description import (
    ATTACH_FILE,
    LORA_JSON,
    MODEL_FILE,
    InsertedBank,
    describe,
)
from remora_build.insert.mapping import (
    Derived,
    check_accounted,
    check_complete,
    derive_plan,
    modules_of,
)
from remora_build.insert.patterns import Linear, find_linears
from remora_build.insert.rewrite import insert_branches
from remora_build.insert.shown import shown
from remora_build.insert.source import SourceModel, read_model
from remora_build.insert.validity import check_valid
from remora_build.insert.value_types import value_types
from remora_build.insert.view import GraphView
from remora_build.staging import staged_directory, write_failed
from remora_build.version import exporter_name
from remora_contract.bundle import BundleFile
from remora_contract.digests import canonical_json, digest_bytes, digest_file, short
from remora_contract.errors import Conflict, InvalidInput, Refused
from remora_contract.targets import PROJECTIONS, Projection

_COPY_BYTES = 8 << 20
_ADAPTER_INPUT = re.compile(r"(?:^|[./])lora_")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Analysis:
    """A model that was read, and its attach points for the wanted projections: derived ones may be
    incomplete. Good for one insertion, which changes the model."""

    source: SourceModel
    view: GraphView
    linears: tuple[Linear, ...]
    wanted: tuple[Projection, ...]
    derived: Derived

    @property
    def plan(self) -> AttachPlan:
        return self.derived.plan

    def check(self) -> None:
        """Raises what stands against an insertion: InvalidInput, Unsupported."""
        if self.derived.problems:
            raise self.derived.problems[0]
        check_complete(self.plan, self.view, self.wanted)


def analyse(
    model: Path,
    *,
    attach: Path | None = None,
    wanted: Sequence[Projection] = PROJECTIONS,
) -> Analysis:
    """Reads MODEL.onnx and derives its attach points, or takes those of `attach`.

    What cannot be mapped is kept as a problem, so that the rest can be written down and corrected.
    Raises NotFound, InvalidInput (no model, hostile sizes or paths, attach points that forget a
    node), Refused (it carries adapters already).
    """
    source = read_model(model)
    _check_bare(source.proto.graph)
    view = GraphView(
        source.proto.graph,
        value_types(source.proto),
        has_functions=bool(source.proto.functions),
    )
    linears = find_linears(view)
    if attach is None:
        derived = derive_plan(view, linears, modules_of(view, linears), wanted)
    else:
        derived = Derived(load_plan(attach).narrowed(wanted))
        check_accounted(derived.plan, view, linears)
    return Analysis(source, view, linears, tuple(wanted), derived)


def _check_bare(graph: Any) -> None:
    for value in graph.input:
        if _ADAPTER_INPUT.search(value.name):
            raise Refused(
                f"the model has the input {shown(value.name)}: it takes adapters already; give the "
                "model as it was exported"
            )


def write_plan(plan: AttachPlan, path: Path, *, replace: bool = False) -> None:
    """The attach points as a document for people to correct. Raises Conflict when the file is there
    already (someone's corrections) and `replace` is not given, Refused, Exhausted."""
    try:
        with path.open("wb" if replace else "xb") as f:
            f.write(plan.document())
    except FileExistsError as e:
        raise Conflict(f"{path} exists already; give --force to replace it") from e
    except OSError as e:
        raise write_failed(path, e) from e


def insert_bank(
    analysis: Analysis,
    out: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> InsertedBank:
    """Writes OUT whole or not at all. Raises InvalidInput naming what could not be mapped,
    Unsupported, Conflict (OUT exists), Exhausted (full disk)."""
    analysis.check()
    gates, branches = resolve(analysis.view, analysis.linears, analysis.plan)
    plan = resolved_plan(analysis.plan, branches)
    source = analysis.source
    _check_data_names(source)
    with staged_directory(out, marker=LORA_JSON, replace=replace) as staging:
        files = _copy_data(source, staging, progress or SilentProgress())
        files.append(_write_graph(source, gates, branches, staging))
        files.append(_write(staging / ATTACH_FILE, plan.document()))
        bank = describe(
            gates,
            branches,
            files,
            source_digest=digest_file(source.path),
            exporter=exporter_name(),
        )
        (staging / LORA_JSON).write_bytes(canonical_json(bank))
    log.info(
        "lora.inserted",
        extra={"branches": len(branches), "source": short(bank.source_digest)},
    )
    return bank


def _check_data_names(source: SourceModel) -> None:
    for name in (MODEL_FILE, ATTACH_FILE, LORA_JSON):
        if name in source.data_files:
            raise InvalidInput(f"{source.path} keeps weights in {shown(name)}; rename that file")


def _copy_data(source: SourceModel, staging: Path, progress: Progress) -> list[BundleFile]:
    total = sum(source.data_files.values())
    advance = progress.stage("weights", total) if total else None
    files = []
    for location in sorted(source.data_files):
        target = staging / location
        target.parent.mkdir(parents=True, exist_ok=True)
        hasher, size = hashlib.sha256(), 0
        with source.data_path(location).open("rb") as old, target.open("wb") as new:
            while block := old.read(_COPY_BYTES):
                new.write(block)
                hasher.update(block)
                size += len(block)
                if advance is not None:
                    advance(len(block))
        files.append(BundleFile(location, size, "sha256:" + hasher.hexdigest()))
    return files


def _write_graph(
    source: SourceModel, gates: Sequence[Gate], branches: Sequence[Branch], staging: Path
) -> BundleFile:
    """The changed model; what it was is checked too when the result does not hold."""
    insert_branches(source.proto, gates, branches)
    try:
        data = source.proto.SerializeToString(deterministic=True)
    except ValueError as e:
        raise InvalidInput(
            f"{source.path} with its adapter inputs is larger than 2 GB: save it with its weights "
            "as external data first"
        ) from e
    file = _write(staging / MODEL_FILE, data)
    del data
    check_valid(source, staging / MODEL_FILE)
    return file


def _write(path: Path, data: bytes) -> BundleFile:
    path.write_bytes(data)
    return BundleFile(path.name, len(data), digest_bytes(data))
