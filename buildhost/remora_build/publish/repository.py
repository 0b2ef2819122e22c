"""What stands in a repository: names, manifests, chunks. Reads and checks; never writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from remora_build.publish.store import LocalStore
from remora_contract.artifact import Kind, Manifest, NameRecord, chunk_key, manifest_key, name_key
from remora_contract.errors import ArtifactInvalid, DocumentInvalid
from remora_contract.strict import loads


@dataclass(frozen=True, order=True)
class Named:
    kind: Kind
    name: str
    revision: str
    digest: str


def read_name(store: LocalStore, kind: Kind, name: str, revision: str) -> str | None:
    """The digest the name stands for; None when it is free. Raises DocumentInvalid."""
    key = name_key(kind, name, revision)
    if store.size(key) is None:
        return None
    return loads(NameRecord, store.read(key), str(store.root / key)).digest


def read_manifest(store: LocalStore, digest: str) -> Manifest | None:
    """None when the digest is not published. Raises ArtifactInvalid, DocumentInvalid."""
    key = manifest_key(digest)
    if store.size(key) is None:
        return None
    manifest = loads(Manifest, store.read(key), str(store.root / key))
    if manifest.digest != digest:
        raise ArtifactInvalid(f"{store.root / key} is the manifest of {manifest.digest}")
    return manifest


def missing_chunks(store: LocalStore, manifest: Manifest) -> list[str]:
    """Digests of chunks that are absent or have another size than the manifest says."""
    return [d for d, size in manifest.chunks().items() if store.size(chunk_key(d)) != size]


def all_names(store: LocalStore) -> Iterator[Named]:
    """Every name, sorted. Raises DocumentInvalid for a damaged one."""
    for kind in get_args(Kind):
        root = store.root / "names" / kind
        for path in sorted(root.glob("*/*.json")):
            name, revision = path.parent.name, path.name.removesuffix(".json")
            try:
                name_key(kind, name, revision)
            except DocumentInvalid as e:
                raise DocumentInvalid(f"{path} is no record of a name: {e}") from e
            digest = read_name(store, kind, name, revision)
            if digest is not None:
                yield Named(kind, name, revision, digest)
