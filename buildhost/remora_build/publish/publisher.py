"""Publishes one artifact: verify -> chunks -> manifest -> name, each durable before the next.

Killed anywhere, it leaves a repository in which every name still leads to a whole artifact; run
again it skips what is there. Owns this order and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from remora_build.publish.chunking import split
from remora_build.publish.repository import missing_chunks, read_manifest, read_name
from remora_build.publish.source import Source, open_source
from remora_build.publish.store import LocalStore
from remora_contract.artifact import (
    FORMAT_VERSION,
    ArtifactFile,
    Chunk,
    Kind,
    Manifest,
    NameRecord,
    check_name,
    chunk_key,
    manifest_key,
    name_key,
)
from remora_contract.bundle import BundleFile, verify_files
from remora_contract.digests import canonical_json, digest_bytes, hex_of, short
from remora_contract.errors import ArtifactInvalid, Conflict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What `publish` did. `new_*` is what this run added, the rest was there (from an earlier run,
    another revision, or another artifact)."""

    kind: Kind
    name: str
    revision: str
    digest: str
    total_bytes: int
    new_bytes: int
    total_chunks: int
    new_chunks: int


def publish(
    directory: Path, store: LocalStore, *, name: str | None, revision: str | None, now: datetime
) -> Published:
    """Publishes a bundle or adapter directory under name and revision (defaults: the directory's
    name, the first 12 hex digits of the digest).

    Raises ArtifactInvalid (a file is damaged), Conflict (the name's revision is another artifact),
    DocumentInvalid (an unusable name), Exhausted (full disk), Refused (no repository).
    """
    source = open_source(directory)
    if name is None:
        name = check_name(directory.resolve().name, "the directory is no name, give a --name:")
    check_name(name, "name")
    revision = check_name(short(source.digest) if revision is None else revision, "revision")
    verify_files(directory, source.files)
    with store.writing():
        is_named = _check_free(store, source, name, revision)
        added = _Tally()
        manifest = _write_artifact(store, source, name, revision, now, added)
        if not is_named:
            record = canonical_json(NameRecord(source.digest))
            store.put(name_key(source.kind, name, revision), record)
    report = Published(
        kind=source.kind,
        name=name,
        revision=revision,
        digest=source.digest,
        total_bytes=manifest.bytes,
        new_bytes=added.bytes,
        total_chunks=len(manifest.chunks()),
        new_chunks=added.chunks,
    )
    log.info("artifact.published", extra={"digest": report.digest, "bytes": report.new_bytes})
    return report


@dataclass
class _Tally:
    chunks: int = 0
    bytes: int = 0


def _check_free(store: LocalStore, source: Source, name: str, revision: str) -> bool:
    """True when the name already stands for this very artifact."""
    taken = read_name(store, source.kind, name, revision)
    if taken is not None and taken != source.digest:
        raise Conflict(
            f"{source.kind} {name} revision {revision} is {short(taken)} and never changes; "
            f"publish {short(source.digest)} under another --revision"
        )
    return taken is not None


def _write_artifact(
    store: LocalStore, source: Source, name: str, revision: str, now: datetime, tally: _Tally
) -> Manifest:
    present = read_manifest(store, source.digest)
    if present is not None and not missing_chunks(store, present):
        return present
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        kind=source.kind,
        digest=source.digest,
        name=name,
        revision=revision,
        base_digest=source.base_digest,
        files=tuple(_write_file(store, source.directory, f, tally) for f in source.files),
        published_at=now.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        facts=source.facts,
    )
    store.flush()
    store.put(manifest_key(source.digest), canonical_json(manifest))
    store.flush()
    return manifest


def _write_file(
    store: LocalStore, directory: Path, file: BundleFile, tally: _Tally
) -> ArtifactFile:
    """Cuts and stores one file, hashing it again: it may have changed since it was verified."""
    path, whole, chunks = directory / file.path, hashlib.sha256(), []
    try:
        with path.open("rb") as stream:
            for piece in split(stream):
                whole.update(piece)
                chunks.append(_write_chunk(store, piece, tally))
    except OSError as e:
        raise ArtifactInvalid(f"{path} cannot be read: {e.strerror or e}") from e
    if whole.hexdigest() != hex_of(file.digest):
        raise ArtifactInvalid(f"{path} changed while it was being published; run it again")
    return ArtifactFile(file.path, file.size, file.digest, tuple(chunks))


def _write_chunk(store: LocalStore, piece: memoryview, tally: _Tally) -> Chunk:
    chunk = Chunk(digest_bytes(piece), len(piece))
    key = chunk_key(chunk.digest)
    if store.size(key) != chunk.size:
        store.put(key, piece)
        tally.chunks += 1
        tally.bytes += chunk.size
    return chunk
