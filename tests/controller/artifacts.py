"""Small published repositories, written as protos/remora_contract/artifact.py says."""

from __future__ import annotations

from pathlib import Path

from remora_contract.artifact import (
    ArtifactFile,
    Chunk,
    Kind,
    Manifest,
    NameRecord,
    chunk_key,
    manifest_key,
    name_key,
)
from remora_contract.digests import canonical_json, digest_bytes
from remora_contract.release import Release, ReleaseAdapter

BASE = digest_bytes(b"base")


def publish(
    root: Path,
    kind: Kind,
    name: str,
    revision: str,
    chunks: list[bytes],
    base: str = BASE,
    **facts: object,
) -> Manifest:
    data = b"".join(chunks)
    listed = tuple(Chunk(digest_bytes(c), len(c)) for c in chunks)
    manifest = Manifest(
        format_version=1,
        kind=kind,
        digest=digest_bytes(f"{kind} {name} {revision}".encode() + data),
        name=name,
        revision=revision,
        base_digest=base,
        files=(ArtifactFile("weights", len(data), digest_bytes(data), listed),),
        published_at="2030-01-01T00:00:00+00:00",
        facts=facts,
    )
    for chunk in chunks:
        write(root / chunk_key(digest_bytes(chunk)), chunk)
    write(root / manifest_key(manifest.digest), canonical_json(manifest))
    record = canonical_json(NameRecord(manifest.digest))
    write(root / name_key(kind, name, revision), record)
    return manifest


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def bundle(root: Path, revision: str = "1", size: int = 1000) -> Manifest:
    chunks = [bytes([i]) * size for i in range(3)] + [revision.encode() * size]
    return publish(root, "bundle", "tiny", revision, chunks, max_bank_rank=32)


def adapter(root: Path, name: str = "sql", revision: str = "1", base: str = BASE) -> Manifest:
    chunks = [f"{name} {revision} ".encode() * 50]
    return publish(root, "adapter", name, revision, chunks, base, rank=8)


def release(name: str, bundle_: Manifest, *adapters: Manifest, **more: object) -> Release:
    listed = tuple(ReleaseAdapter(a.name, a.revision, a.digest) for a in adapters)
    return Release(1, name, bundle_.digest, listed, **more)
