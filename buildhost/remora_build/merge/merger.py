"""The merge from start to end: checkpoint and adapters opened, everything planned, then written to
a directory that appears whole or not at all. Owns the order of work only.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from remora_build.adapters.base_checkpoint import CheckpointBase
from remora_build.export.progress import Progress, SilentProgress
from remora_build.merge.adapter import (
    OpenAdapter,
    Weighted,
    check_composition,
    check_weights,
    open_adapter,
)
from remora_build.merge.documents import (
    MERGE_JSON,
    MergedAdapter,
    copy_documents,
    untie,
    write_record,
)
from remora_build.merge.planning import MergePlan, open_checkpoint, plan_merge
from remora_build.merge.reading import CheckpointReader
from remora_build.merge.writing import ShardWriter, threads
from remora_build.staging import staged_directory
from remora_contract.bundle import load_bundle
from remora_contract.errors import Exhausted, RequestInvalid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """`changed` of `tensors` differ from the checkpoint's; `bytes` are those of the tensors."""

    adapters: tuple[MergedAdapter, ...]
    tensors: int
    changed: int
    untied: bool
    bytes: int


def merge_adapters(
    checkpoint: Path,
    adapters: Sequence[Weighted],
    out: Path,
    *,
    replace: bool = False,
    base: Path | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Writes the checkpoint directory OUT: W + Σ weight · scaling · B A for every adapted weight.
    `base`: a bundle whose base the checkpoint must be, by digest.

    Raises CheckpointInvalid, AdapterInvalid, DocumentInvalid, ArtifactInvalid or Unsupported for
    the input, Refused for another checkpoint than the bundle's, RequestInvalid for an OUT within
    it, Conflict when OUT exists and `replace` is not given, Exhausted on a full disk. On any error,
    and when killed, OUT is as it was before.
    """
    check_weights(adapters)
    _check_apart(out, checkpoint, adapters)
    source = open_checkpoint(checkpoint)
    if base is not None:
        _check_base(checkpoint, base, progress or SilentProgress())
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(i, a)) for i, a in enumerate(adapters)]
        check_composition(opened)
        reader = stack.enter_context(CheckpointReader())
        plan = plan_merge(source, opened, reader)
        _check_room(out, plan.bytes)
        listed = tuple(MergedAdapter(a.name, a.digest, a.source.weight) for a in opened)
        with staged_directory(out, marker=MERGE_JSON, replace=replace) as staging:
            copy_documents(checkpoint, staging)  # one that is missing is told before the long work
            _write_weights(plan, opened, reader, staging, progress or SilentProgress())
            if plan.untied:
                untie(checkpoint, staging, plan.new_head)
            write_record(staging, listed, untied=plan.untied)
    log.info("checkpoint.merged", extra={"adapters": len(listed), "changed": plan.changed})
    return Merged(listed, plan.count, plan.changed, plan.untied, plan.bytes)


def _write_weights(
    plan: MergePlan,
    adapters: Sequence[OpenAdapter],
    reader: CheckpointReader,
    staging: Path,
    progress: Progress,
) -> None:
    advance = progress.stage("weights", plan.bytes)
    with ThreadPoolExecutor(threads(), thread_name_prefix="merge") as pool:
        writer = ShardWriter(reader, adapters, pool, advance)
        for name, outputs in plan.shards.items():
            if any(o.change is not None or o.entry == plan.new_head for o in outputs):
                writer.write(staging / name, outputs)
            else:
                shutil.copyfile(outputs[0].entry.path, staging / name)
                advance(sum(o.entry.bytes for o in outputs))


def _check_base(checkpoint: Path, bundle: Path, progress: Progress) -> None:
    """PEFT's files do not say which bytes they were trained on: a bundle's do. Raises Refused."""
    with CheckpointBase(checkpoint, load_bundle(bundle)) as own:
        own.advance = progress.stage("base weights", own.bytes)
        own.confirm()


def _check_apart(out: Path, checkpoint: Path, adapters: Sequence[Weighted]) -> None:
    """Raises RequestInvalid when OUT lies in the checkpoint, or is or holds what is read. (Below an
    adapter it is welcome: training leaves adapters in directories of runs.)"""
    target, source = out.resolve(), checkpoint.resolve()
    read = [source, *(a.directory.resolve() for a in adapters)]
    inside = next((p for p in read if p == target or target in p.parents), None)
    if inside is None and source in target.parents:
        inside = source
    if inside is not None:
        raise RequestInvalid(f"OUT {out} and {inside} lie within each other: choose another OUT")


def _check_room(out: Path, needed: int) -> None:
    """Raises Exhausted before hours of work that could not be kept."""
    place = next((p for p in out.resolve().parents if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    if free < needed:
        raise Exhausted(
            f"{out} needs {needed / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB free: make room "
            "or choose another place"
        )
