"""Chunks that this device has already, inside the files of artifacts it was sent before.

Beside each artifact stays the manifest it came with (`artifacts/.<hex>.manifest`). A manifest
without its artifact, or one that cannot be read, says nothing: what is not found here is fetched.
Nothing that is found is trusted: whoever copies it hashes it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from remora_agent.control.layout import StateLayout
from remora_agent.control.manifest import parse_manifest
from remora_contract.artifact import Manifest
from remora_contract.digests import canonical_json, hex_of
from remora_contract.errors import InvalidInput, Unsupported

log = logging.getLogger(__name__)
SUFFIX = ".manifest"


@dataclass(frozen=True)
class Place:
    """Where a chunk's bytes begin."""

    path: Path
    offset: int


def remember(layout: StateLayout, manifest: Manifest) -> None:
    """Before the artifact gets its name. Raises OSError."""
    path = layout.artifacts / f".{hex_of(manifest.digest)}{SUFFIX}"
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(canonical_json(manifest))
    fresh.replace(path)


def remembered(layout: StateLayout, digest: str) -> Manifest | None:
    """Of an artifact that is whole; None where it is not, or its manifest cannot be read."""
    path = layout.artifacts / f".{hex_of(digest)}{SUFFIX}"
    try:
        if layout.artifact(digest).is_dir() and path.exists():
            return parse_manifest(path.read_bytes(), digest)
    except (OSError, InvalidInput, Unsupported) as e:
        log.warning("manifest.unreadable", extra={"path": str(path), "cause": str(e)})
    return None


def find_chunks(layout: StateLayout, wanted: Collection[str]) -> dict[str, Place]:
    """Those of the wanted chunks that lie in whole artifacts here."""
    found: dict[str, Place] = {}
    if not wanted:
        return found
    for manifest in _manifests(layout):
        directory = layout.artifact(manifest.digest)
        for file in manifest.files:
            offset = 0
            for chunk in file.chunks:
                if chunk.digest in wanted:
                    found.setdefault(chunk.digest, Place(directory / file.path, offset))
                offset += chunk.size
    return found


def _manifests(layout: StateLayout) -> Iterator[Manifest]:
    """Of artifacts that are whole."""
    for path in layout.artifacts.glob(f".*{SUFFIX}"):
        found = remembered(layout, f"sha256:{path.name[1 : -len(SUFFIX)]}")
        if found is not None:
            yield found
