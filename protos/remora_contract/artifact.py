"""Manifest of a published artifact: which chunks make which files.

A repository is a folder (or any store with the same keys):

    cas/sha256/ab/<64 hex>        chunks, named by the sha256 of their bytes
    manifests/<64 hex>.json       manifests, named by the artifact's digest
    names/<kind>/<name>/<revision>.json   {"digest": …}: what people call it

The artifact's digest is its document's (bundle.json, adapter.json, engine.json), so a verified
document vouches for every file, and the chunk list is only a way to fetch them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from remora_contract.bundle import check_relative
from remora_contract.digests import check_digest, hex_of
from remora_contract.errors import DocumentInvalid

Kind = Literal["bundle", "adapter", "engine"]
FORMAT_VERSION = 1
MAX_CHUNK_BYTES = 16 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Chunk:
    digest: str
    size: int

    def __post_init__(self) -> None:
        check_digest(self.digest, "chunk digest")
        if not 0 < self.size <= MAX_CHUNK_BYTES:
            raise ValueError(f"chunk size {self.size} is outside 1..{MAX_CHUNK_BYTES}")


@dataclass(frozen=True)
class ArtifactFile:
    path: str
    size: int
    digest: str
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        check_relative(self.path)
        check_digest(self.digest, self.path)
        if sum(c.size for c in self.chunks) != self.size:
            raise ValueError(f"{self.path}: its chunks do not add up to {self.size} bytes")


@dataclass(frozen=True)
class Signature:
    """Reserved: filled when signing lands. An agent refuses signatures it cannot check."""

    key_id: str
    value: str


@dataclass(frozen=True)
class Manifest:
    format_version: int
    kind: Kind
    digest: str
    name: str
    revision: str
    base_digest: str
    files: tuple[ArtifactFile, ...]
    published_at: str  # RFC 3339, UTC
    signatures: tuple[Signature, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)  # what `plan` needs: rank, dtype, context…

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"format version {self.format_version} is not {FORMAT_VERSION}")
        check_digest(self.digest, "digest")
        check_digest(self.base_digest, "base_digest")
        check_name(self.name, "name")
        check_name(self.revision, "revision")

    @property
    def bytes(self) -> int:
        return sum(f.size for f in self.files)

    def chunks(self) -> dict[str, int]:
        """Each distinct chunk's digest and size, in order of first use."""
        return {c.digest: c.size for f in self.files for c in f.chunks}


@dataclass(frozen=True)
class NameRecord:
    """names/<kind>/<name>/<revision>.json: what a revision of a name is, for ever."""

    digest: str

    def __post_init__(self) -> None:
        check_digest(self.digest, "digest")


def check_name(text: str, what: str) -> str:
    """Names and revisions become file names and flags. Raises DocumentInvalid."""
    if not _NAME.fullmatch(text):
        raise DocumentInvalid(
            f"{what} {text[:80]!r}: use letters, digits, '.', '_' and '-', at most 128 characters"
        )
    return text


def chunk_key(digest: str) -> str:
    """Path of a chunk below a content-addressed store's root."""
    name = hex_of(digest)
    return f"cas/sha256/{name[:2]}/{name}"


def manifest_key(digest: str) -> str:
    return f"manifests/{hex_of(digest)}.json"


def name_key(kind: Kind, name: str, revision: str) -> str:
    return f"names/{kind}/{check_name(name, 'name')}/{check_name(revision, 'revision')}.json"
