"""Explains a repository and what a publish did to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from remora_build.inspect.render import Report, Table, size_text
from remora_build.publish.publisher import Published
from remora_build.publish.repository import Named, all_names, missing_chunks, read_manifest
from remora_build.publish.store import LocalStore
from remora_contract.artifact import Manifest, chunk_key
from remora_contract.digests import digest_file, short
from remora_contract.errors import ArtifactInvalid

_COLUMNS = ("kind", "name", "revision", "digest", "size", "base", "published")


def describe_repository(root: Path, *, verify: bool = False) -> Report:
    """Raises ArtifactInvalid for a name that leads to no whole artifact, and, with `verify`, for a
    chunk whose bytes are not what its name says."""
    store = LocalStore(root)
    entries = [(named, _whole_manifest(store, named)) for named in all_names(store)]
    chunks = _distinct_chunks(m for _, m in entries)
    if verify:
        _verify_chunks(store, chunks)
    checked = f"all {len(chunks)} match their digests" if verify else "not hashed (--verify does)"
    return Report(
        title=f"Repository {root}",
        data=_data(entries, chunks, verified=verify),
        facts=(
            ("names", str(len(entries))),
            ("artifacts", str(len({m.digest for _, m in entries}))),
            ("published", size_text(_published_bytes(entries))),
            ("stored", f"{size_text(sum(chunks.values()))} in {len(chunks)} chunks, each once"),
            ("chunks", checked),
        ),
        tables=(Table("Artifacts", _COLUMNS, tuple(_row(n, m) for n, m in entries)),),
    )


def describe_published(report: Published) -> Report:
    """What `remora-build publish` prints."""
    known = report.total_bytes - report.new_bytes
    return Report(
        title=f"Published {report.kind} {report.name} revision {report.revision}",
        data=asdict(report),
        facts=(
            ("digest", report.digest),
            ("total", f"{size_text(report.total_bytes)} in {report.total_chunks} chunks"),
            ("new", f"{size_text(report.new_bytes)} in {report.new_chunks} chunks"),
            ("there before", size_text(known)),
        ),
    )


def _whole_manifest(store: LocalStore, named: Named) -> Manifest:
    manifest = read_manifest(store, named.digest)
    label = f"{named.kind} {named.name} revision {named.revision}"
    if manifest is None:
        raise ArtifactInvalid(f"{label}: its manifest {short(named.digest)} is missing")
    missing = missing_chunks(store, manifest)
    if missing:
        raise ArtifactInvalid(
            f"{label}: {len(missing)} chunks are missing or cut short, first "
            f"{store.root / chunk_key(missing[0])}; publish it again"
        )
    return manifest


def _verify_chunks(store: LocalStore, chunks: Iterable[str]) -> None:
    for digest in chunks:
        path = store.root / chunk_key(digest)
        if digest_file(path) != digest:
            raise ArtifactInvalid(f"{path} is damaged; delete it and publish its artifact again")


def _distinct_chunks(manifests: Iterable[Manifest]) -> dict[str, int]:
    chunks: dict[str, int] = {}
    for manifest in manifests:
        chunks.update(manifest.chunks())
    return chunks


def _published_bytes(entries: list[tuple[Named, Manifest]]) -> int:
    return sum({m.digest: m.bytes for _, m in entries}.values())


def _row(named: Named, manifest: Manifest) -> tuple[str, ...]:
    return (
        named.kind,
        named.name,
        named.revision,
        short(named.digest),
        size_text(manifest.bytes),
        short(manifest.base_digest),
        manifest.published_at,
    )


def _data(
    entries: list[tuple[Named, Manifest]], chunks: dict[str, int], *, verified: bool
) -> dict[str, Any]:
    return {
        "kind": "repository",
        "stored_bytes": sum(chunks.values()),
        "published_bytes": _published_bytes(entries),
        "chunks": len(chunks),
        "verified": verified,
        "names": [
            {
                **asdict(named),
                "bytes": manifest.bytes,
                "base_digest": manifest.base_digest,
                "published_at": manifest.published_at,
                "facts": manifest.facts,
            }
            for named, manifest in entries
        ],
    }
