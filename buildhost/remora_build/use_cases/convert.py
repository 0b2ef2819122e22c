"""A use-case document + a folder of adapters + one bundle -> use_cases.json and converted adapters.

All adapters are converted and fit the bundle together as the use cases compose them, or nothing is
written.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from remora_build.adapters.convert import convert_adapter
from remora_build.adapters.sidecar import Dtype
from remora_build.export.progress import Progress, SilentProgress
from remora_build.staging import staged_directory
from remora_build.use_cases.source import Places, compare, locate, qairt_files, read_file
from remora_contract.adapter import ADAPTER_JSON, Adapter, load_adapter
from remora_contract.bundle import Bundle, BundleFile, load_bundle, verify_files
from remora_contract.compat import adapter_refusals
from remora_contract.digests import canonical_json, digest_file, short
from remora_contract.errors import AdapterInvalid, Incompatible, Refused
from remora_contract.use_cases import (
    ADAPTERS_DIR,
    USE_CASES_JSON,
    UseCaseAdapter,
    UseCaseDocument,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Converted:
    document: UseCaseDocument
    notes: tuple[str, ...]  # what could not be compared with QAIRT's own files


def convert_use_cases(
    file: Path,
    out: Path,
    *,
    base: Path,
    places: Places,
    dtype: Dtype | None = None,
    replace_out: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Writes OUT for the bundle directory `base`.

    Raises what `convert_adapter` raises, NotFound (an adapter's directory), AdapterInvalid (it is
    not what QAIRT's file or the document says), Refused (a use case wider than the bank, or that
    composes DoRA), Conflict (OUT exists), Exhausted (full disk).
    """
    bundle = load_bundle(base)
    document, home = read_file(file)
    directories = locate(document, home, places)
    adapters: dict[str, Adapter] = {}
    notes: list[str] = []
    with staged_directory(out, marker=USE_CASES_JSON, replace=replace_out) as staging:
        advance = (progress or SilentProgress()).stage("converting adapters", len(directories))
        for entry in document.adapters:
            target = staging / ADAPTERS_DIR / entry.name
            adapter = _place(directories[entry.name], target, base, bundle, dtype)
            _check_pinned(entry, adapter)
            notes += compare(entry.name, adapter, qairt_files(entry, home))
            adapters[entry.name] = adapter
            advance(1)
        check_bank(document, {n: a.rank for n, a in adapters.items()}, bundle.graph.max_bank_rank)
        check_dora(document, adapters)
        converted = replace(
            document,
            base_digest=bundle.base_digest,
            adapters=tuple(_converted(a, adapters[a.name]) for a in document.adapters),
            files=_files(staging),
        )
        (staging / USE_CASES_JSON).write_bytes(canonical_json(converted))
    log.info(
        "use_cases.converted",
        extra={"adapters": len(adapters), "use_cases": len(converted.use_cases)},
    )
    return Converted(converted, tuple(notes))


def columns(document: UseCaseDocument, ranks: Mapping[str, int]) -> dict[str, int]:
    """Use case -> bank columns that its adapters take together."""
    return {u.name: sum(ranks[n] for n in u.adapter_names) for u in document.use_cases}


def check_bank(document: UseCaseDocument, ranks: Mapping[str, int], limit: int) -> None:
    """Raises Refused naming every use case that no engine of the bundle could hold."""
    wide = {n: c for n, c in columns(document, ranks).items() if c > limit}
    if wide:
        listed = ", ".join(f"{name} ({need})" for name, need in wide.items())
        raise Refused(
            f"the bundle's bank holds {limit} columns; these use cases need more: {listed}. "
            f"Export the base again with --max-bank-rank {max(wide.values())}"
        )


def check_dora(document: UseCaseDocument, adapters: Mapping[str, Adapter]) -> None:
    """Raises Refused naming a use case that every engine would refuse when it is asked for."""
    for case in document.use_cases:
        for name, alpha in zip(case.adapter_names, case.alphas, strict=True):
            if adapters[name].dora and (len(case.adapter_names) > 1 or alpha != 1):
                raise Refused(
                    f"use case {case.name}: {name} is a DoRA adapter, which answers alone and with "
                    "weight 1: its norms hold for these very weights; give it a use case of its "
                    "own, or train it without use_dora"
                )


def _place(source: Path, target: Path, base: Path, bundle: Bundle, dtype: Dtype | None) -> Adapter:
    """The converted adapter at `target`: converted, or copied where it was already."""
    if not (source / ADAPTER_JSON).is_file():
        return convert_adapter(source, target, base=base, dtype=dtype)
    adapter = load_adapter(source)
    if dtype is not None and adapter.dtype != dtype:
        raise AdapterInvalid(
            f"{source} is converted to {adapter.dtype} already; give the PEFT adapter it came "
            "from, or leave --dtype out"
        )
    if refusals := adapter_refusals(bundle, adapter):
        raise Incompatible(refusals)
    verify_files(source, adapter.files)
    target.mkdir(parents=True)
    for name in (ADAPTER_JSON, *(f.path for f in adapter.files)):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    verify_files(target, adapter.files)
    return adapter


def _check_pinned(entry: UseCaseAdapter, adapter: Adapter) -> None:
    if entry.digest is not None and entry.digest != adapter.digest:
        raise AdapterInvalid(
            f"adapter {entry.name} has digest {short(adapter.digest)}; the document says "
            f"{short(entry.digest)}"
        )


def _converted(entry: UseCaseAdapter, adapter: Adapter) -> UseCaseAdapter:
    return replace(entry, directory=f"{ADAPTERS_DIR}/{entry.name}", digest=adapter.digest)


def _files(staging: Path) -> tuple[BundleFile, ...]:
    paths = sorted(p for p in staging.rglob("*") if p.is_file())
    return tuple(
        BundleFile(p.relative_to(staging).as_posix(), p.stat().st_size, digest_file(p))
        for p in paths
    )
