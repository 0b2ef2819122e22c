"""Manifests from the network: parsed, bounded and checked before anything is taken from them. Pure.

A manifest is only a way to fetch: what vouches for the bytes is the document (bundle.json,
adapter.json, engine.json) whose digest was assigned, so `check_document` compares the two file by
file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from remora_contract.adapter import ADAPTER_JSON
from remora_contract.artifact import ArtifactFile, Kind, Manifest
from remora_contract.bundle import BUNDLE_JSON, BundleFile
from remora_contract.digests import short
from remora_contract.engine import ENGINE_JSON
from remora_contract.errors import ArtifactInvalid, Exhausted, Unsupported
from remora_contract.strict import loads

MAX_FILES = 10_000
_DOCUMENTS: dict[Kind, str] = {
    "bundle": BUNDLE_JSON,
    "adapter": ADAPTER_JSON,
    "engine": ENGINE_JSON,
}
MAX_DOCUMENT_BYTES = 64 << 20


def parse_manifest(data: bytes, digest: str) -> Manifest:
    """Raises DocumentInvalid or ArtifactInvalid for a manifest that lies about itself, Unsupported
    for signatures: one that cannot be checked must not look like one that was."""
    where = f"manifest of {short(digest)}"
    manifest = loads(Manifest, data, where)
    if manifest.digest != digest:
        raise ArtifactInvalid(f"{where} is the manifest of {short(manifest.digest)}")
    if manifest.signatures:
        raise Unsupported(
            f"{where} carries signatures, which this agent cannot check; update the agent"
        )
    if len(manifest.files) > MAX_FILES:
        raise ArtifactInvalid(f"{where} lists {len(manifest.files)} files, more than {MAX_FILES}")
    paths = [f.path for f in manifest.files]
    if len(set(paths)) != len(paths):
        raise ArtifactInvalid(f"{where} lists a file twice")
    document = next((f for f in manifest.files if f.path == document_name(manifest)), None)
    if document is None:
        raise ArtifactInvalid(f"{where} has no {document_name(manifest)}")
    if document.size > MAX_DOCUMENT_BYTES:
        raise ArtifactInvalid(f"{where}: {document.path} is larger than {MAX_DOCUMENT_BYTES} bytes")
    _check_chunk_sizes(manifest, where)
    return manifest


def document_name(manifest: Manifest) -> str:
    return _DOCUMENTS[manifest.kind]


def check_document(manifest: Manifest, digest: str, files: Iterable[BundleFile]) -> None:
    """The manifest ships exactly what the document vouches for. `digest` and `files` are the
    document's own. Raises ArtifactInvalid naming the first difference."""
    if digest != manifest.digest:
        raise ArtifactInvalid(
            f"{document_name(manifest)} has digest {short(digest)}, assigned was "
            f"{short(manifest.digest)}"
        )
    vouched = {f.path: (f.size, f.digest) for f in files}
    shipped = {f.path: (f.size, f.digest) for f in manifest.files}
    shipped.pop(document_name(manifest))
    for path in sorted(vouched.keys() | shipped.keys()):
        if vouched.get(path) != shipped.get(path):
            raise ArtifactInvalid(
                f"{path} of {short(digest)}: the manifest and {document_name(manifest)} disagree; "
                "publish the artifact again"
            )


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that fetching a manifest writes at its worst moment, beside the floor."""

    download: int
    assembly: int  # the largest file of several chunks exists twice for a moment

    @property
    def total(self) -> int:
        return self.download + self.assembly


def disk_need(missing: Sequence[ArtifactFile], held: int) -> DiskNeed:
    """For the files that are not on disk yet, of which `held` bytes lie there as chunks."""
    largest = max((f.size for f in missing if len(f.chunks) > 1), default=0)
    return DiskNeed(max(0, sum(f.size for f in missing) - held), largest)


def check_disk(need: DiskNeed, free: int, floor: int, what: str) -> None:
    """Raises Exhausted naming need and have."""
    if need.total + floor > free:
        raise Exhausted(
            f"{what} needs {need.total} bytes of disk and {floor} must stay free, but only {free} "
            "are free; remove something or lower limits.disk_floor_bytes"
        )


def _check_chunk_sizes(manifest: Manifest, where: str) -> None:
    sizes: dict[str, int] = {}
    for file in manifest.files:
        for chunk in file.chunks:
            if sizes.setdefault(chunk.digest, chunk.size) != chunk.size:
                raise ArtifactInvalid(f"{where} gives chunk {short(chunk.digest)} two sizes")
