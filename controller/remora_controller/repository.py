"""Reads the published repository: manifests, names, chunks. Never writes; knows no network.

A chunk is served only when a manifest names it. The folder is looked at again at most once a
second, and only new manifests are parsed. A damaged manifest is reported once and left out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import get_args

from remora_contract.artifact import (
    Kind,
    Manifest,
    NameRecord,
    check_name,
    chunk_key,
    manifest_key,
)
from remora_contract.bundle import read_document
from remora_contract.digests import check_digest, short
from remora_contract.errors import ArtifactInvalid, InvalidInput, NotFound
from remora_contract.strict import loads

log = logging.getLogger(__name__)
RESCAN_S = 1.0


@dataclass(frozen=True)
class Published:
    """One revision of a name."""

    kind: Kind
    name: str
    revision: str
    digest: str
    bytes: int
    base_digest: str
    published_at: float


@dataclass(frozen=True)
class Index:
    """A consistent look at the repository."""

    manifests: Mapping[str, Manifest] = field(default_factory=dict)
    published: tuple[Published, ...] = ()  # newest first
    chunks: Mapping[str, int] = field(default_factory=dict)  # digest -> bytes

    def manifest(self, digest: str) -> Manifest:
        """Raises NotFound saying how to publish it."""
        found = self.manifests.get(digest)
        if found is None:
            raise NotFound(
                f"artifact {short(digest)} is not in this controller's repository; publish it "
                "with `remora-build publish`"
            )
        return found


class Repository:
    def __init__(self, root: Path, monotonic: Callable[[], float]) -> None:
        self.root = root
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._index = Index()
        self._scanned_at: float | None = None
        self._reported: set[str] = set()

    def index(self, *, is_fresh: bool = False) -> Index:
        """`is_fresh` looks at the folder now: for operators, who just published something."""
        with self._lock:
            now = self._monotonic()
            is_old = self._scanned_at is None or now - self._scanned_at >= RESCAN_S
            if is_old or is_fresh:
                self._index = self._scan(self._index)
                self._scanned_at = now
            return self._index

    def manifest_json(self, digest: str) -> bytes:
        """The manifest as published. Raises DocumentInvalid for no digest, NotFound."""
        self.index().manifest(check_digest(digest))
        return read_document(self.root / manifest_key(digest))

    def chunk(self, digest: str) -> tuple[Path, int]:
        """Path and size of a published chunk. Raises DocumentInvalid, NotFound, ArtifactInvalid."""
        size = self.index().chunks.get(check_digest(digest))
        if size is None:
            raise NotFound(f"no published artifact has a chunk {short(digest)}")
        path = self.root / chunk_key(digest)
        if not path.is_file() or path.stat().st_size != size:
            raise ArtifactInvalid(
                f"chunk {short(digest)} is missing or damaged in {self.root}; publish its "
                "artifact again"
            )
        return path, size

    def _scan(self, before: Index) -> Index:
        manifests = self._scan_manifests(before.manifests)
        published = sorted(
            (p for kind in get_args(Kind) for p in self._scan_names(kind, manifests)),
            key=lambda p: (-p.published_at, p.kind, p.name, p.revision),
        )
        if manifests.keys() == before.manifests.keys():
            return Index(before.manifests, tuple(published), before.chunks)
        chunks = {d: size for m in manifests.values() for d, size in m.chunks().items()}
        return Index(manifests, tuple(published), chunks)

    def _scan_manifests(self, known: Mapping[str, Manifest]) -> dict[str, Manifest]:
        found = {}
        for path in sorted((self.root / "manifests").glob("*.json")):
            digest = f"sha256:{path.name.removesuffix('.json')}"
            manifest = known.get(digest) or self._read_manifest(path, digest)
            if manifest is not None:
                found[digest] = manifest
        return found

    def _read_manifest(self, path: Path, digest: str) -> Manifest | None:
        try:
            manifest = loads(Manifest, read_document(path), str(path))
        except InvalidInput as e:
            self._skip(path, str(e))
            return None
        if manifest.digest != digest:
            self._skip(path, f"it is the manifest of {manifest.digest}")
            return None
        return manifest

    def _scan_names(self, kind: Kind, manifests: Mapping[str, Manifest]) -> list[Published]:
        found = []
        for path in sorted((self.root / "names" / kind).glob("*/*.json")):
            try:
                name = check_name(path.parent.name, "name")
                revision = check_name(path.name.removesuffix(".json"), "revision")
                digest = loads(NameRecord, read_document(path), str(path)).digest
            except InvalidInput as e:
                self._skip(path, str(e))
                continue
            if digest in manifests:
                found.append(_published(manifests[digest], kind, name, revision, path))
        return found

    def _skip(self, path: Path, reason: str) -> None:
        if str(path) not in self._reported:
            self._reported.add(str(path))
            log.warning("artifact.unreadable", extra={"path": str(path), "reason": reason})


def _published(manifest: Manifest, kind: Kind, name: str, revision: str, record: Path) -> Published:
    """The name record's own time orders revisions: an old artifact can get a new name."""
    try:
        at = record.stat().st_mtime
    except OSError:
        at = datetime.fromisoformat(manifest.published_at).timestamp()
    return Published(
        kind, name, revision, manifest.digest, manifest.bytes, manifest.base_digest, at
    )
