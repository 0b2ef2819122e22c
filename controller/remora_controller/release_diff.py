"""What differs between two releases: bundle and quantization, adapters, use cases, sampling,
constraints, gates, whatever else the document has. Pure.

A release is read as paths and values; entries of lists that have names stand under their names, so
that another order is no difference. What a bundle and an adapter are comes from their manifests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from remora_contract.artifact import Manifest
from remora_contract.release import Release
from remora_contract.strict import plain

_SAME_ANYWAY = ("format_version",)


@dataclass(frozen=True)
class Difference:
    """`before` and `after` are JSON; None where the path is not there."""

    path: str
    before: str | None
    after: str | None


def release_differences(
    before: Release, after: Release, manifests: Mapping[str, Manifest]
) -> list[Difference]:
    """By path. `manifests` has those artifacts that are (still) published."""
    old, new = _paths(before, manifests), _paths(after, manifests)
    return [
        Difference(path, old.get(path), new.get(path))
        for path in sorted({*old, *new})
        if old.get(path) != new.get(path)
    ]


def _paths(release: Release, manifests: Mapping[str, Manifest]) -> dict[str, str]:
    document = {k: v for k, v in plain(release).items() if k not in _SAME_ANYWAY}
    document["bundle"] = _artifact(release.bundle, manifests)
    document["adapters"] = {
        a.name: {"revision": a.revision, **_artifact(a.digest, manifests)} for a in release.adapters
    }
    return dict(_flat(document, ""))


def _artifact(digest: str, manifests: Mapping[str, Manifest]) -> dict[str, object]:
    manifest = manifests.get(digest)
    if manifest is None:
        return {"digest": digest}
    names = {"name": manifest.name, "revision": manifest.revision, "bytes": manifest.bytes}
    return {"digest": digest, **names, "facts": manifest.facts}


def _flat(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list) and value and all(_name(entry) for entry in value):
        value = {_name(e): {k: v for k, v in e.items() if k != "name"} for e in value}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif value not in (None, []):
        yield path, json.dumps(value, sort_keys=True, ensure_ascii=False)


def _name(entry: object) -> str | None:
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None
